"""From packed rows to hidden states and log-probabilities. No padded token reaches a layer of the model."""

import torch
from airl_kernels import linear_logprob

from airl_fast.errors import UserError
from airl_fast.models.attention import dense_masks, keep_own_attention, packed_kernel, sliding_window
from airl_fast.models.flash import Kernel, choose_kernel, pieces
from airl_fast.models.load import LanguageModel
from airl_fast.pack import pack
from airl_fast.types import Kind, Trace, TraceBatch


def hidden_states(backbone: torch.nn.Module, batch: TraceBatch) -> torch.Tensor:
    """Last hidden state of every row, [N, H]."""
    inputs = {"input_ids": batch.tokens[None], "position_ids": batch.positions[None], "use_cache": False}
    device, kernel = batch.tokens.device, attention_kernel(backbone, batch.tokens.device)
    packing = None if kernel is None else pieces(batch.segments, device, kernel)
    window = sliding_window(backbone.config)
    if packing is None or (window is not None and window < packing.longest):
        return backbone(attention_mask=dense_masks(batch, backbone.config), **inputs).last_hidden_state[0]
    # A mask of four dimensions is taken as it is, so transformers neither builds one nor asks the device about it.
    unread = batch.tokens.new_zeros(1, 1, 1, 1)
    return backbone(attention_mask=unread, packing=packing, **inputs).last_hidden_state[0]


def attention_kernel(backbone: torch.nn.Module, device: torch.device) -> Kernel | None:
    """What packed attention runs on, None for a model that keeps its own."""
    name = packed_kernel(backbone)
    return None if name is None else choose_kernel(name, device, backbone.get_input_embeddings().weight.dtype)


@torch.no_grad()
def verify_packing(lm: LanguageModel, key: str = "model.path") -> None:
    """Compare packed rows with plain sequences, two completions of one prompt, before anything is trained on them.

    A model that computes something else over packed rows goes back to its own attention, with the reason for the log;
    one that does so even then is refused with UserError.
    """
    apart = _packing_error(lm)
    if apart is not None and packed_kernel(lm.backbone) is not None:
        keep_own_attention(lm.model, f"{type(lm.model).__name__} computes something else over packed rows ({apart})")
        apart = _packing_error(lm)
    if apart is not None:
        raise UserError(
            f"{key}: a {type(lm.model).__name__} cannot be trained on packed sequences ({apart}); "
            "use another architecture, such as Qwen2 or Llama."
        )


def _packing_error(lm: LanguageModel) -> str | None:
    ids = [i % lm.num_tokens for i in range(9)]
    completions = (ids[4:7], ids[7:9])
    traces = [
        Trace(group=0, kind=Kind.POLICY, prompt_tokens=tuple(ids[:4]), tokens=tuple(tokens), text="")
        for tokens in completions
    ]
    batch = pack(traces, lm.device)
    try:
        packed = hidden_states(lm.backbone, batch)[batch.label_rows].split(batch.loss_lengths)
    except (RuntimeError, TypeError, ValueError) as error:  # what a model raises that does not know the arguments
        return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
    for tokens, found in zip(completions, packed, strict=True):
        whole = torch.tensor([ids[:4] + tokens], device=lm.device)
        alone = lm.backbone(input_ids=whole, use_cache=False).last_hidden_state[0, 4:]
        error = (found - alone).abs().max() / alone.abs().max().clamp_min(1e-6)
        if not error <= 0.05:  # rounding in bfloat16 stays well below; NaN is an error
            return f"its states differ by {100 * error.item():.3g} %"
    return None


def token_logprobs(
    lm: LanguageModel, batch: TraceBatch, *, temperature: float = 1.0, entropy: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log π(label) of every completion token, f32 [M]; with `entropy` also that of its distribution, f32 [M]."""
    return linear_logprob(
        hidden_states(lm.backbone, batch),
        targets=batch.labels,
        temperature=temperature,
        rows=batch.loss_rows,
        entropy=entropy,
        **lm.projection,
    )

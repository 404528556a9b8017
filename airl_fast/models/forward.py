"""From packed rows to hidden states and log-probabilities. No padded token reaches a layer of the model."""

import torch
from airl_kernels import linear_logprob

from airl_fast.models.attention import dense_masks, packed_kernel, sliding_window
from airl_fast.models.flash import Kernel, choose_kernel, pieces
from airl_fast.models.load import LanguageModel
from airl_fast.types import TraceBatch


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


def token_logprobs(
    lm: LanguageModel, batch: TraceBatch, *, temperature: float = 1.0, entropy: bool = False
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """log π(label) of every completion token, f32 [M]; with `entropy` also that of its distribution, f32 [M]."""
    return linear_logprob(
        hidden_states(lm.backbone, batch),
        lm.head_weight,
        batch.labels,
        bias=lm.head_bias,
        temperature=temperature,
        softcap=lm.softcap,
        logit_scale=lm.logit_scale,
        rows=batch.loss_rows,
        entropy=entropy,
    )

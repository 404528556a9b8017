"""From packed rows to hidden states and log-probabilities. No padded token reaches a layer of the model."""

import numpy as np
import torch
from airl_kernels import linear_logprob

from airl_fast.models.attention import dense_masks, packed_kernel, sliding_window
from airl_fast.models.flash import Kernel, choose_kernel, pieces
from airl_fast.models.load import LanguageModel
from airl_fast.models.regimes import Regimes, regimes_of
from airl_fast.pack import on_device, rows_of, select
from airl_fast.types import TraceBatch


def hidden_states(backbone: torch.nn.Module, batch: TraceBatch) -> torch.Tensor:
    """Last hidden state of every row, [N, H]: each trace's as if it were alone, whatever lengths are beside it."""
    parts = apart(batch, regimes_of(backbone))
    if len(parts) == 1:
        return one_pass(backbone, batch)
    rows = np.concatenate([rows_of(batch, sequences) for sequences in parts])
    if len(rows) > batch.segments.num_rows:
        raise RuntimeError("traces of different regimes share a prompt; pack them with the regimes of their reader")
    states = torch.cat([one_pass(backbone, select(batch, sequences)[0]) for sequences in parts])
    return states[on_device(np.argsort(rows), batch.tokens.device)]


def apart(batch: TraceBatch, regimes: Regimes) -> list[list[int]]:
    """The sequences of each regime in the batch."""
    if not regimes:
        return [list(range(batch.num_sequences))]
    found: dict[object, list[int]] = {}
    for s, (prompt, completion) in enumerate(zip(batch.prompt_of, batch.loss_lengths, strict=True)):
        found.setdefault(regimes.of(batch.segments.prompts[prompt] + completion), []).append(s)
    return list(found.values())


def one_pass(backbone: torch.nn.Module, batch: TraceBatch) -> torch.Tensor:
    """Last hidden state of every row, [N, H], of traces that are all of one regime."""
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
        targets=batch.labels,
        temperature=temperature,
        rows=batch.loss_rows,
        entropy=entropy,
        **lm.projection,
    )

"""Read prompts into a KV cache: as packed rows, so that no padded token reaches the model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache

from airl_fast.models.attention import sliding_window
from airl_fast.models.flash import pieces
from airl_fast.models.forward import attention_kernel
from airl_fast.models.load import LanguageModel
from airl_fast.types import Segments


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """cache: keys and values of B prompts, [B, Hkv, T, D] a layer, a shorter prompt's at the right end. mask: int64
    [B, T], 1 where there is a token. logits: [B, V], of the token after each prompt."""

    cache: DynamicCache
    mask: torch.Tensor
    logits: torch.Tensor


def read_prompts(lm: LanguageModel, prompts: Sequence[Sequence[int]]) -> Prefill:
    """Prompts of one regime; RuntimeError for others."""
    if len({lm.regimes.of(len(prompt)) for prompt in prompts}) > 1:
        raise RuntimeError("prompts of different regimes are read together; decode them through crossing.py")
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    columns = torch.arange(width) - (width - lengths)[:, None]  # position of every place, negative before the prompt
    mask = (columns >= 0).long().to(lm.device)
    kernel = attention_kernel(lm.backbone, lm.device)
    cache = DynamicCache(config=lm.model.config)
    windowed = sliding_window(lm.model.config.get_text_config()) is not None  # whose cache forgets
    if kernel is None or windowed or len(set(lengths.tolist())) == 1:
        return _as_rectangle(lm, prompts, columns, mask, cache)
    segments = Segments(prompts=tuple(lengths.tolist()), completions=(), counts=(0,) * len(prompts))
    starts = lengths.cumsum(0) - lengths
    place = (starts[:, None] + columns.clamp_min(0)).to(lm.device)  # the packed row that every place of the cache shows
    rows = torch.tensor([token for prompt in prompts for token in prompt], device=lm.device)
    positions = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(lm.device)
    hidden = lm.backbone(
        input_ids=rows[None],
        position_ids=positions[None],
        attention_mask=rows.new_zeros(1, 1, 1, 1),
        past_key_values=cache,
        use_cache=True,
        packing=pieces(segments, lm.device, kernel),
    ).last_hidden_state[0]
    for layer in cache.layers:
        layer.keys = layer.keys[0][:, place].transpose(0, 1).contiguous()
        layer.values = layer.values[0][:, place].transpose(0, 1).contiguous()
    return Prefill(cache=cache, mask=mask, logits=_logits(lm, hidden[place[:, -1]]))


def _as_rectangle(
    lm: LanguageModel, prompts: Sequence[Sequence[int]], columns: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
) -> Prefill:
    """Prompts of one length; or of several, padded on the left, for a model whose attention is not ours."""
    tokens = torch.zeros(len(prompts), mask.shape[1], dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        tokens[i, mask.shape[1] - len(prompt) :] = torch.tensor(prompt)
    output = lm.model(
        input_ids=tokens.to(lm.device),
        attention_mask=None if bool((columns >= 0).all()) else mask,
        position_ids=columns.clamp_min(0).to(lm.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefill(cache=cache, mask=mask, logits=output.logits[:, -1])


def _logits(lm: LanguageModel, hidden: torch.Tensor) -> torch.Tensor:
    logits = lm.head(hidden) * lm.logit_scale
    return logits if lm.softcap is None else lm.softcap * torch.tanh(logits / lm.softcap)

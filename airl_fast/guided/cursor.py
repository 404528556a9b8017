"""The discriminator as it follows traces that are being written: r(s, a) of candidates for the next token.

An action head knows the reward of every token from the state before it: one token read for one written. A linear
head reads the state after the token, so each candidate has to be read before it has a reward.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from airl_kernels import token_rewards
from transformers import DynamicCache

from airl_fast.discriminator import Discriminator
from airl_fast.models.heads import LinearHead
from airl_fast.models.regimes import regimes_of


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """What a head asks of a batch: which states it reads, and the tokens taken there. int64 [M] each."""

    loss_rows: torch.Tensor
    label_rows: torch.Tensor
    labels: torch.Tensor


class Cursor:
    """Reads R prompts, then one token a row, with a KV cache. The same numbers as Discriminator.logits of the whole.

    prompts: token ids, of any lengths within one regime, in the discriminator's own tokenizer. RuntimeError for others,
    and for rows that would leave it.
    """

    def __init__(self, model: Discriminator, prompts: Sequence[Sequence[int]]) -> None:
        self._model, self._device = model, next(model.backbone.parameters()).device
        self._cache = DynamicCache(config=model.backbone.config)
        regimes = regimes_of(model.backbone)
        if len({regimes.of(len(prompt)) for prompt in prompts}) > 1:
            raise RuntimeError("prompts of different regimes are read together")
        rooms = [regimes.room(len(prompt)) for prompt in prompts]
        self._left = None if None in rooms else min(rooms)  # tokens until the first row has left its regime
        width = self._width = max(len(prompt) for prompt in prompts)
        ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        self._padded = not bool(mask.all())
        self._mask = mask.to(self._device)
        self._hidden = self._forward(ids.to(self._device), (mask.cumsum(1) - 1).clamp_min(0).to(self._device))

    @property
    def tries(self) -> bool:
        """Must a candidate be read before it has a reward?"""
        return isinstance(self._model.head, LinearHead)

    def rewards(self, candidates: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """r(s, a), f32 [R, k], of candidates int64 [R, k]. logprobs: f32 [R, k], the start policy's, which only the
        head `logprob` reads."""
        rows, k = candidates.shape
        hidden = self._after(candidates) if self.tries else self._hidden
        before = torch.arange(rows, device=self._device).repeat_interleave(k)
        labels = candidates.flatten()
        places = _Rows(loss_rows=before, label_rows=torch.arange(rows * k, device=self._device), labels=labels)
        inputs = self._model.head(hidden, places, logprobs.flatten() if self._model.head.needs_reference else None)
        values = token_rewards(
            inputs.hidden, inputs.weight, inputs.bias, index=inputs.index, offset=inputs.offset, kind="logit"
        )
        return values.float().view(rows, k)

    def read(self, ids: torch.Tensor, keep: torch.Tensor) -> None:
        """Go on by one token. ids: int64 [R], what the rows drew. keep: int64 [R'], the rows that go on."""
        if len(keep) < len(self._mask):
            self._cache.batch_select_indices(keep)
            self._mask, ids = self._mask[keep], ids[keep]
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(ids), 1)], 1)
        self._hidden = self._forward(ids[:, None], self._mask.sum(1, keepdim=True) - 1)

    def _after(self, candidates: torch.Tensor) -> torch.Tensor:
        """The state after each candidate, [R * k, H]; the cache is left as it was."""
        rows, k = candidates.shape
        length, mask = self._cache.get_seq_length(), self._mask
        self._cache.batch_repeat_interleave(k)
        self._mask = torch.cat([mask.repeat_interleave(k, 0), mask.new_ones(rows * k, 1)], 1)
        hidden = self._forward(candidates.reshape(-1, 1), self._mask.sum(1, keepdim=True) - 1)
        self._cache.crop(length)
        self._cache.batch_select_indices(torch.arange(rows, device=self._device) * k)
        self._mask = mask
        return hidden

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Last hidden state of each row's last token, [rows, H]."""
        if self._left is not None and self._mask.shape[1] - self._width >= self._left:
            raise RuntimeError("a row has grown out of its regime")
        return self._model.backbone(
            input_ids=ids,
            attention_mask=self._mask if self._padded else None,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

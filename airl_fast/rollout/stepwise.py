"""Decode from anywhere, each row until it has had enough: a step has ended, a budget is spent, its turn is over.

Every row draws from a stream of uniform numbers of its own, one number a token. So a row's tokens depend on its
stream, the weights and what it continues, not on the rows it happens to be batched with; and a row that pauses and
goes on draws what it would have drawn without the pause.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch

from airl_fast.models.load import LanguageModel
from airl_fast.models.regimes import ONE, Regimes
from airl_fast.rollout.builtin import decode
from airl_fast.rollout.crossing import decode_by_regime
from airl_fast.rollout.engine import Sample, SamplingParams
from airl_fast.rollout.pick import pick

_BLOCK = 64  # uniform numbers drawn ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """tokens: what is read, the prompt and what has been written after it. limit: the most tokens to add, at least
    one. stream: the key of the row's uniform numbers; rows of one call have different ones."""

    tokens: tuple[int, ...]
    limit: int
    stream: tuple[int, ...]


class Guide(Protocol):
    """Changes the distribution that the rows of one batch draw from."""

    def shift(self, rows: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """rows: which rows of the batch are still decoded. logits: f32 [R, V] of the policy, before temperature."""

    def taken(self, ids: torch.Tensor) -> None:
        """The tokens int64 [R] that the rows of the last `shift` drew."""


class Streams:
    """A stream of uniform numbers for each key, which goes on where it was left."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._open: dict[Hashable, tuple[np.random.Generator, list[float]]] = {}

    def next(self, keys: Sequence[tuple[int, ...]]) -> np.ndarray:
        """The next number of each stream, f32 [R] in 0..1."""
        return np.array([self._one(key) for key in keys], dtype=np.float32)

    def _one(self, key: tuple[int, ...]) -> float:
        if key not in self._open:
            self._open[key] = (np.random.default_rng([self._seed, *key]), [])
        generator, ahead = self._open[key]
        if not ahead:
            ahead.extend(generator.random(_BLOCK, dtype=np.float32)[::-1].tolist())
        return ahead.pop()


@torch.no_grad()
def extend(
    lm: LanguageModel,
    starts: Sequence[Start],
    params: SamplingParams,
    streams: Streams,
    *,
    stop: Callable[[int, int], bool] | None = None,
    guide: Callable[[Sequence[int]], Guide] | None = None,
    regimes: Regimes = ONE,
) -> list[Sample]:
    """What each start is continued with, in the order given. `params.max_new_tokens` and `params.seed` are not read.

    stop(start, token): has this start had enough after the token it has just drawn? guide(starts of a batch): what
    shifts that batch's logits. regimes: of the guide's model; a batch is of one. What a start reads is read anew in
    every call.
    """
    samples: list[Sample | None] = [None] * len(starts)
    for chosen in _batches([len(start.tokens) for start in starts], params.batch_size, regimes):
        batch = [starts[i] for i in chosen]
        shifting = None if guide is None else guide(chosen)

        def draw(rows, logits, batch=batch, shifting=shifting):
            if shifting is not None:
                logits = shifting.shift(rows, logits)
            uniform = None
            if params.temperature != 0:
                numbers = streams.next([batch[row].stream for row in rows])
                uniform = torch.from_numpy(numbers).to(logits.device)[:, None]
            ids, logprobs = pick(logits, params.temperature, params.top_p, uniform)
            if shifting is not None:
                shifting.taken(ids)
            return ids, logprobs

        def stops(row, token, chosen=chosen):
            return stop is not None and stop(chosen[row], token)

        limits = [start.limit for start in batch]
        prompts = [start.tokens for start in batch]
        decoded = decode_by_regime(decode, lm, prompts, limits, params.ends, draw, stops)
        for i, sample in zip(chosen, decoded, strict=True):
            samples[i] = sample
    return samples


def _batches(lengths: Sequence[int], size: int, regimes: Regimes) -> Iterator[list[int]]:
    """Equal lengths together: less padding."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for _, members in groupby(order, key=lambda i: regimes.of(lengths[i])):
        chosen = list(members)
        yield from (chosen[begin : begin + size] for begin in range(0, len(chosen), size))

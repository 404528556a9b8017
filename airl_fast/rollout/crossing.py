"""Decode rows of any lengths though some lengths are read with other rotary factors (`models.regimes`).

Keys in a cache have the factors of the regime that they were read in. So a batch decodes rows of one regime, and a row
that grows out of it is read anew with the factors of the next: every token is drawn from what the model says of the
row's tokens so far, read alone, which is what transformers' `generate` gives without a cache.
"""

from collections.abc import Callable, Collection, Sequence

import torch

from airl_fast.models.load import LanguageModel
from airl_fast.rollout.engine import Sample


def decode_by_regime(
    decode: Callable[..., list[Sample]],
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    limits: Sequence[int],
    ends: Collection[int],
    draw: Callable[[Sequence[int], torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    stop: Callable[[int, int], bool] | None = None,
) -> list[Sample]:
    """As `builtin.decode`, the first argument, of the others. `draw` and `stop` are given rows of this call."""
    regimes = lm.regimes
    if not regimes:
        return decode(lm, prompts, limits, ends, draw, stop)
    found = [Sample(tokens=(), logprobs=(), finished=False) for _ in prompts]
    over = [False] * len(prompts)

    def length(row: int) -> int:
        return len(prompts[row]) + len(found[row].tokens)

    while not all(over):
        regime = min(regimes.of(length(row)) for row in range(len(prompts)) if not over[row])
        rows = [row for row in range(len(prompts)) if not over[row] and regimes.of(length(row)) == regime]
        left = [limits[row] - len(found[row].tokens) for row in rows]
        rooms = [regimes.room(length(row)) for row in rows]
        until = [n if room is None else min(n, room) for n, room in zip(left, rooms, strict=True)]
        asked = [0] * len(rows)  # tokens of this round that `stop` has seen

        def draw_of(places, logits, rows=rows):
            return draw([rows[place] for place in places], logits)

        def stops(place, token, rows=rows, asked=asked):
            asked[place] += 1
            over[rows[place]] = stop is not None and stop(rows[place], token)
            return over[rows[place]]

        so_far = [(*prompts[row], *found[row].tokens) for row in rows]
        more = decode(lm, so_far, until, ends, draw_of, stops)
        for place, (row, sample) in enumerate(zip(rows, more, strict=True)):
            found[row] = Sample(
                tokens=found[row].tokens + sample.tokens,
                logprobs=found[row].logprobs + sample.logprobs,
                finished=sample.finished,
            )
            over[row] = over[row] or sample.finished or len(sample.tokens) == left[place]
            if not over[row] and asked[place] < len(sample.tokens):  # its last token was at the end of the regime
                stops(place, sample.tokens[-1])
    return found

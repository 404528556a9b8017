"""Score many traces: in parts that are told of, and joined again."""

from collections.abc import Callable, Sequence

import numpy as np

from airl_fast.judge.judge import Judge, Scored
from airl_fast.measures.localise import TokenValues
from airl_fast.types import Example, Trace

PART = 2048  # traces packed at once


def score_all(
    judge: Judge,
    traces: Sequence[Trace],
    examples: Sequence[Example],
    step_ends: Sequence[Sequence[int] | None] | None = None,
    *,
    say: Callable[[str], None] = lambda text: None,
    part: int = PART,
) -> Scored:
    """As `Judge.score`, `part` traces at a time; only their values per token are held together."""
    found = []
    for start in range(0, len(traces), part):
        say(f"score traces {start + 1} to {min(start + part, len(traces))} of {len(traces)}")
        ends = None if step_ends is None else step_ends[start : start + part]
        found.append(judge.score(traces[start : start + part], examples, ends))
    return found[0] if len(found) == 1 else join(found)


def join(parts: Sequence[Scored]) -> Scored:
    return Scored(
        traces=tuple(trace for part in parts for trace in part.traces),
        reward=_join([part.reward for part in parts]),
        logprob=_join([part.logprob for part in parts]),
    )


def _join(parts: Sequence[TokenValues]) -> TokenValues:
    before = np.cumsum([0, *(part.offsets[-1] for part in parts)])
    return TokenValues(
        values=np.concatenate([part.values for part in parts]),
        offsets=np.concatenate([[0], *(part.offsets[1:] + at for part, at in zip(parts, before, strict=False))]),
        step_ends=np.concatenate([part.step_ends for part in parts]),
        answer_mask=np.concatenate([part.answer_mask for part in parts]),
    )

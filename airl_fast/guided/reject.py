"""Early rejection: samples that the reward finds bad while they are written are not written to their end.

As speculative rejection (Sun et al. 2024, arXiv 2410.20290), with two differences: the reward is dense, so a prefix
has a score of its own, and the floor is absolute, calibrated on demonstrations, not a quantile of the samples at hand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from airl_fast.errors import UserError
from airl_fast.guided.records import Draft, Outcome
from airl_fast.guided.session import Session
from airl_fast.measures.localise import TokenValues
from airl_fast.measures.passk import Floats
from airl_fast.measures.rerank import Scorer

Running = Literal["min", "mean"]
_SCORERS: dict[Running, Scorer] = {"min": "min_step", "mean": "mean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """n: samples begun. floor: a sample is stopped when its running score falls below this; -inf stops none.

    running: the lowest step so far, or the mean of all tokens so far. keep: the share of demonstrations that the floor
    was made to let pass, for the label alone. When every sample of a prompt was stopped, the
    one that stood best when it was stopped is written to its end.
    """

    n: int
    floor: float
    running: Running = "min"
    keep: float | None = None

    @property
    def label(self) -> str:
        keep = "" if self.keep is None else f" keep={self.keep:g}"
        return f"reject n={self.n}{keep}{' mean' if self.running == 'mean' else ''}"

    def solve(self, session: Session) -> Sequence[Outcome]:
        problems = range(len(session.problems))
        opened = [session.fresh(problem, slot) for problem in problems for slot in range(self.n)]
        ended: list[Draft] = []
        stopped: list[list[tuple[float, Draft]]] = [[] for _ in problems]
        while opened:
            grown = session.to_step(opened)
            ended += [draft for draft in grown if draft.done]
            opened = [draft for draft in grown if not draft.done]
            standing = session.score(opened, _SCORERS[self.running])
            for draft, score in zip(opened, standing, strict=True):
                if score < self.floor:
                    stopped[draft.problem].append((score, draft))
            opened = [draft for draft, score in zip(opened, standing, strict=True) if score >= self.floor]
        alive = {draft.problem for draft in ended}
        revived = [max(stopped[p], key=lambda pair: pair[0])[1] for p in problems if p not in alive]
        ended += session.to_end(revived)
        scores = session.score(ended)
        return [
            session.outcome(
                ended[i], scores[i], {"stopped": len(stopped[p]), "samples": self.n, "revived": p not in alive}
            )
            for p, i in enumerate(session.best(ended, scores))
        ]


def lowest_running(values: TokenValues, running: Running) -> Floats:
    """The lowest running score at any step end of each trace, f64 [S]: what a floor must not exceed to let it pass."""
    ends = np.flatnonzero(values.step_ends)
    trace = np.searchsorted(values.offsets, ends, side="right") - 1
    sums = np.concatenate([[0.0], np.cumsum(values.values)])
    if running == "mean":
        start = values.offsets[trace]
        scores = (sums[ends + 1] - sums[start]) / (ends + 1 - start)
    else:
        starts = np.concatenate([[0], ends[:-1] + 1])
        scores = (sums[ends + 1] - sums[starts]) / (ends + 1 - starts)
    lowest = np.full(len(values.offsets) - 1, np.inf)
    np.minimum.at(lowest, trace, scores)
    return lowest


def floor_that_keeps(lowest: Floats, keep: float) -> float:
    """The highest floor under which at least the share `keep` of these traces, f64 [S], passes whole."""
    if not 0.0 < keep <= 1.0:
        raise UserError(f"--keep {keep:g}: give a share above 0 and up to 1, such as 0.95.")
    return float(np.sort(lowest)[int((1.0 - keep) * len(lowest) + 1e-9)])

"""Plain best-of-N: whole samples, the highest-scored is taken. What every guided method has to beat."""

from collections.abc import Sequence
from dataclasses import dataclass

from airl_fast.guided.records import Outcome
from airl_fast.guided.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOf:
    """n: samples of each prompt."""

    n: int

    @property
    def label(self) -> str:
        return f"best of {self.n}"

    def solve(self, session: Session) -> Sequence[Outcome]:
        slots = [session.fresh(problem, slot) for problem in range(len(session.problems)) for slot in range(self.n)]
        drafts = session.to_end(slots)
        scores = session.score(drafts)
        return [session.outcome(drafts[i], scores[i], {"samples": self.n}) for i in session.best(drafts, scores)]

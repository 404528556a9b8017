"""Self-revision: a finished trace is cut before its first suspicious step and written anew from there.

The reward says where (`evaluate.localise`, as in localisation) and whether the new version is better. Each round
starts from the best version so far; a trace whose steps all lie above the threshold is left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from airl_fast.guided.records import Draft, Outcome
from airl_fast.guided.session import Session
from airl_fast.measures.localise import StepScores, step_scores, suspicion


@dataclass(frozen=True, slots=True, kw_only=True)
class Revise:
    """n: samples to begin with, of which the best is revised. rounds: at most so many revisions of a prompt.

    threshold: the step score (`evaluate.step_score`) below which a step is suspicious; `evaluate.localise` names
    which one is first. -inf revises nothing.
    """

    n: int
    rounds: int
    threshold: float

    @property
    def label(self) -> str:
        return f"revise n={self.n} R={self.rounds}"

    def solve(self, session: Session) -> Sequence[Outcome]:
        problems = range(len(session.problems))
        first = session.to_end([session.fresh(problem, slot) for problem in problems for slot in range(self.n)])
        versions = self._judge(session, first)
        best = [versions[i] for i in session.best(first, np.array([version.score for version in versions]))]
        history: list[list[dict]] = [[] for _ in problems]
        for number in range(self.rounds):
            revised = [version for version in best if version.cut is not None]
            if not revised:
                break
            begun = [
                Draft(problem=v.draft.problem, slot=self.n + number, tokens=v.draft.tokens[: v.cut]) for v in revised
            ]
            for old, new in zip(revised, self._judge(session, session.to_end(begun)), strict=True):
                problem, better = old.draft.problem, new.score > old.score
                history[problem].append({"from_step": old.step, "score": _number(new.score), "kept": better})
                if better:
                    best[problem] = new
        return [session.outcome(v.draft, v.score, {"revisions": history[p]}) for p, v in enumerate(best)]

    def _judge(self, session: Session, drafts: Sequence[Draft]) -> list["_Version"]:
        settings, values = session.judge.config.evaluate, session.read(drafts)
        scores, steps = session.rate(values), step_scores(values, settings.step_score)
        finite = self.threshold if np.isfinite(self.threshold) else None
        doubt = None if finite is None else suspicion(steps, settings.localise, finite)
        made = []
        for i, draft in enumerate(drafts):
            step = None if doubt is None else _suspicious(steps, doubt, i, self.threshold)
            ends = np.flatnonzero(values.step_ends[values.offsets[i] : values.offsets[i + 1]])
            cut = None if step is None else 0 if step == 0 else int(ends[step - 1]) + 1
            made.append(_Version(draft=draft, score=float(scores[i]), step=step, cut=cut))
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _Version:
    """step: the first suspicious one, None when there is none. cut: how many tokens lie before it."""

    draft: Draft
    score: float
    step: int | None
    cut: int | None


def _suspicious(steps: StepScores, doubt: np.ndarray, trace: int, threshold: float) -> int | None:
    own = slice(steps.offsets[trace], steps.offsets[trace + 1])
    return int(np.argmax(doubt[own])) if (steps.values[own] < threshold).any() else None


def _number(score: float) -> float | None:
    return score if np.isfinite(score) else None

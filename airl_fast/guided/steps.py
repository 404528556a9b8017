"""Step-level beam search by the learned reward.

Keep B partial traces; extend each by M sampled next steps; score what is written so far; keep the best B. The search
of Xie et al. 2023 (arXiv 2305.00633) and Snell et al. 2024 (arXiv 2408.03314, "beam search" against a process
reward), with the discriminator's dense reward in the place of a verifier that was trained on labelled steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from airl_fast.guided.records import Draft, Outcome
from airl_fast.guided.session import Session

_Tokens = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beam:
    """beam: partial traces kept (B). expand: next steps sampled from each (M); from the prompt, B times M.

    Equal prefixes are one: else the beam fills with copies of the likeliest. A trace that has ended keeps its place
    in the beam for as long as it is among the best, at no cost; every ended trace takes part in the last choice,
    by the run's own scorer. beam = expand = 1 is plain sampling.
    """

    beam: int
    expand: int

    @property
    def label(self) -> str:
        return f"steps B={self.beam} M={self.expand}"

    def solve(self, session: Session) -> Sequence[Outcome]:
        problems = range(len(session.problems))
        width = self.beam * self.expand
        opened = [session.fresh(problem, slot) for problem in problems for slot in range(width)]
        ended: list[dict[_Tokens, Draft]] = [{} for _ in problems]  # every trace that is done
        held: list[dict[_Tokens, tuple[float, Draft]]] = [{} for _ in problems]  # done, and still in the beam
        rounds = [0] * len(session.problems)
        while opened:
            grown = session.to_step(opened)
            for draft, score in zip(grown, session.score(grown, session.prefix_scorer), strict=True):
                held[draft.problem].setdefault(draft.tokens, (float(score), draft))
                if draft.done:
                    ended[draft.problem].setdefault(draft.tokens, draft)
            opened = []
            for problem in sorted({draft.problem for draft in grown}):
                rounds[problem] += 1
                kept = sorted(held[problem].values(), key=lambda pair: -pair[0])[: self.beam]
                held[problem] = {draft.tokens: (score, draft) for score, draft in kept if draft.done}
                active = [draft for _, draft in kept if not draft.done for _ in range(self.expand)]
                opened += [Draft(problem=problem, slot=slot, tokens=d.tokens) for slot, d in enumerate(active)]
        candidates = [draft for drafts in ended for draft in drafts.values()]
        scores = session.score(candidates)
        return [
            session.outcome(candidates[i], scores[i], {"rounds": rounds[problem], "ended_traces": len(ended[problem])})
            for problem, i in enumerate(session.best(candidates, scores))
        ]

"""Token-level guidance: the policy's next-token distribution, shifted by the reward of each token.

The next token is drawn from

    π'(a | s) ∝ π(a | s) exp(β r(s, a)),                                                                   (1)

the maximiser of E[r(s, a)] - KL(π' ‖ π) / β over one step (Ziebart 2010; Levine 2018, arXiv 1805.00909). For r learned
by AIRL there is more to it: a discriminator that is optimal between the expert's and the policy's pairs (s, a) has
the logit

    r(s, a) = log p_E(s, a) - log p_π(s, a) = log π_E(a | s) - log π(a | s) + log p_E(s) - log p_π(s),

whose last two terms do not depend on a. So (1) with β = 1 would be the expert's policy, β = 0 is the policy's own,
and β between them is their geometric mean. What keeps practice from that: D is not optimal, its labels are smoothed,
its negatives are also perturbed traces and the samples of a policy that moved while it learned, and a linear head's
reward is of the state reached, not of the choice. Guidance by a token reward at decoding is ARGS (Khanov et al. 2024,
arXiv 2402.01694); multiplying by a classifier's odds is FUDGE (Yang and Klein 2021, arXiv 2104.05218).

Only the `top_k` likeliest tokens are given a reward: D has seen what policy and expert write, and its logit of
anything else is a guess that exp(β ·) would blow up; and a linear head has to read every candidate. With the advantage
A(s, a) = r(s, a) - Σ π(b | s) r(s, b) / Σ π(b | s), sums over those top_k, the others stay at A = 0. By Jensen's
inequality their share of the distribution then never grows, whatever the rewards.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from airl_fast.errors import UserError
from airl_fast.guided.cursor import Cursor
from airl_fast.guided.records import Draft, Outcome
from airl_fast.guided.session import Session
from airl_fast.judge.judge import Judge

TOP_K = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reweigh:
    """n: traces written of each prompt under guidance, of which the highest-scored is taken. beta: β. top_k: how many
    of the likeliest tokens are scored at each place."""

    n: int
    beta: float
    top_k: int

    @property
    def label(self) -> str:
        return f"tokens n={self.n} β={self.beta:g}" + ("" if self.top_k == TOP_K else f" k={self.top_k}")

    def solve(self, session: Session) -> Sequence[Outcome]:
        slots = [session.fresh(problem, slot) for problem in range(len(session.problems)) for slot in range(self.n)]
        drafts = session.to_end(slots, lambda batch: Reweighing(session, batch, self.beta, self.top_k))
        scores = session.score(drafts)
        return [session.outcome(drafts[i], scores[i], {"samples": self.n}) for i in session.best(drafts, scores)]


def check_guidable(judge: Judge) -> None:
    """UserError when the rewards of single tokens cannot be had while they are chosen."""
    if judge.bridge.chat is not None:
        raise UserError(
            "--guided tokens scores the policy's own tokens, but the discriminator of this run has another tokenizer; "
            "use --guided steps, which compares whole steps, or a policy with the discriminator's tokenizer."
        )
    if judge.model.head.needs_reference and judge.policy is not judge.model.reference[0]:
        raise UserError(
            "--guided tokens needs the start policy's log-probabilities for this run's discriminator.head=logprob; "
            "use --policy start, or --guided steps."
        )


def reweighed(
    logits: torch.Tensor, candidates: torch.Tensor, rewards: torch.Tensor, beta: float, temperature: float
) -> torch.Tensor:
    """logits f32 [R, V] + T β A(s, a): the temperature T that they will be divided by leaves β A. Temperature 0 is
    greedy among π(a | s) exp(β r(s, a)), π at temperature 1.

    candidates: int64 [R, k], distinct in a row. rewards: f32 [R, k], theirs.
    """
    scale = temperature or 1.0
    weights = (logits.gather(-1, candidates) / scale).softmax(-1)
    advantages = rewards - (weights * rewards).sum(-1, keepdim=True)
    return logits.scatter_add(-1, candidates, scale * beta * advantages)


class Reweighing:
    """The guide of one batch of drafts; see `rollout.stepwise.Guide`."""

    def __init__(self, session: Session, drafts: Sequence[Draft], beta: float, top_k: int) -> None:
        self._session, self._drafts, self._beta = session, drafts, beta
        self._top_k = min(top_k, session.lm.num_tokens)
        self._cursor = Cursor(session.judge.model, [session.prompt(draft) + draft.tokens for draft in drafts])
        self._rows: Sequence[int] = ()
        self._ids: torch.Tensor | None = None

    def shift(self, rows: Sequence[int], logits: torch.Tensor) -> torch.Tensor:
        """See `reweighed`; first the tokens that the rows drew are read."""
        if self._ids is not None:
            place = {row: i for i, row in enumerate(self._rows)}
            self._cursor.read(self._ids, torch.tensor([place[row] for row in rows], device=logits.device))
            self._count(rows, 1)
        self._rows = tuple(rows)
        candidates = logits.topk(self._top_k, dim=-1).indices
        judged = self._with_own_end(candidates)
        rewards = self._cursor.rewards(judged, logits.log_softmax(-1).gather(-1, judged))
        if self._cursor.tries:
            self._count(rows, self._top_k)
        return reweighed(logits, candidates, rewards, self._beta, self._session.params.temperature)

    def taken(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def _with_own_end(self, candidates: torch.Tensor) -> torch.Tensor:
        """Another end gets the end of turn's reward, as it does in a finished trace (`Bridge.pack`)."""
        chat = self._session.judge.maker.chat
        others = torch.tensor(sorted(chat.other_ends), device=candidates.device, dtype=candidates.dtype)
        return torch.where(torch.isin(candidates, others), chat.end_of_turn, candidates)

    def _count(self, rows: Sequence[int], tokens: int) -> None:
        for row in rows:
            self._session.scored[self._drafts[row].problem] += tokens

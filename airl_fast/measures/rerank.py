"""Choose among N samples of a prompt: by score, by vote, at random, or with hindsight; how often is the pick right?

Every way of choosing yields one success probability per prompt, exact over ties (equal scores are picked with equal
chance, never by position), so all ways are compared on the same bootstrap resamples and may be subtracted pairwise.
pass@k|N is the chance that one of the k picks is right. Notation: P prompts, N samples a prompt, M tokens, S traces.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airl_fast.errors import UserError
from airl_fast.measures.localise import StepRule, TokenValues, step_scores
from airl_fast.measures.passk import (
    RESAMPLES,
    Estimate,
    Floats,
    as_correct,
    as_finite,
    check_k,
    mean_estimate,
    paired_difference,
    pass_at_k_per_prompt,
)

Scorer = Literal["answer", "mean", "min_step", "last"]
NO_ANSWER = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Reranking:
    """pass@k|N of every way of choosing, by name, with the success per prompt (f64 [P]) behind each."""

    k: int
    n: int
    estimates: Mapping[str, Estimate]
    per_prompt: Mapping[str, Floats]

    def difference(self, first: str, second: str, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
        """pass@k|N of `first` minus that of `second`, with a paired interval."""
        for name in (first, second):
            if name not in self.per_prompt:
                raise UserError(f"there is no reranker {name!r}; choose from {', '.join(self.per_prompt)}.")
        return paired_difference(self.per_prompt[first], self.per_prompt[second], resamples=resamples, seed=seed)


def rerank(
    correct: ArrayLike,
    scores: Mapping[str, ArrayLike],
    *,
    k: int = 1,
    classes: ArrayLike | None = None,
    votes: Mapping[str, ArrayLike] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Reranking:
    """pass@k|N by every named score [P, N], beside `random`, `oracle` and, given answer classes, `majority`.

    correct: bool [P, N]. classes: int [P, N] from `answer_classes`. votes: named non-negative weights [P, N] for
    weighted majority votes (needs classes). A name used twice raises UserError.
    """
    correct = as_correct(correct)
    per_prompt = {name: choose_by_score(values, correct, k) for name, values in scores.items()}
    others = {"random": pass_at_k_per_prompt(correct, k), "oracle": correct.any(axis=1).astype(np.float64)}
    if classes is not None:
        others["majority"] = choose_by_vote(classes, correct, k=k)
        for name, weights in (votes or {}).items():
            if name in others:
                raise UserError(f"the name {name!r} of a vote is taken by a baseline; rename it.")
            others[name] = choose_by_vote(classes, correct, weights, k=k)
    elif votes:
        raise UserError("weighted votes need answer classes; pass classes= from answer_classes().")
    taken = sorted(per_prompt.keys() & others.keys())
    if taken:
        raise UserError(f"the name {taken[0]!r} of a score is taken by a baseline or a vote; rename it.")
    per_prompt |= others
    estimates = {name: mean_estimate(v, resamples=resamples, seed=seed) for name, v in per_prompt.items()}
    return Reranking(k=k, n=correct.shape[1], estimates=estimates, per_prompt=per_prompt)


def choose_by_score(scores: ArrayLike, correct: ArrayLike, k: int = 1) -> Floats:
    """Chance per prompt, f64 [P], that one of the k highest-scored samples is right.

    scores: [P, N], finite or −inf (a sample that is picked only when nothing else is left). correct: bool [P, N].
    """
    correct = as_correct(correct)
    check_k(k, correct.shape[1])
    return _top_k_success(_as_scores(scores, correct.shape), correct.astype(np.float64), k)


def choose_by_vote(classes: ArrayLike, correct: ArrayLike, weights: ArrayLike | None = None, k: int = 1) -> Floats:
    """Chance per prompt, f64 [P], that one of the k answers with most votes is right.

    classes: int [P, N], samples with equal answers share a number, NO_ANSWER never votes. weights: [P, N] >= 0, one
    vote each when None (`vote_weights` makes them from rewards). The chosen answer stands for a random sample that
    gave it. A prompt without any answer counts as wrong.
    """
    correct = as_correct(correct)
    prompts, n = correct.shape
    check_k(k, n)
    classes = np.asarray(classes)
    if classes.shape != correct.shape or classes.dtype.kind not in "iu":
        raise UserError(f"classes must be whole numbers of shape {correct.shape}, but have shape {classes.shape}.")
    if weights is None:
        weights = np.ones(correct.shape)
    weights = as_finite("vote weights", weights, ndim=2)
    if weights.shape != correct.shape or (weights < 0).any():
        raise UserError(f"vote weights must be >= 0 and of shape {correct.shape}; see vote_weights().")
    # Number the classes of each prompt 0..N-1 by the first sample that holds them, to count on a flat axis.
    first = np.argmax(classes[:, :, None] == classes[:, None, :], axis=2)
    cell = (np.arange(prompts)[:, None] * n + first).ravel()
    answered = (classes != NO_ANSWER).ravel()

    def per_class(values: Floats) -> Floats:
        return np.bincount(cell[answered], weights=values.ravel()[answered], minlength=prompts * n).reshape(prompts, n)

    members = per_class(np.ones(correct.shape))
    success = per_class(correct.astype(np.float64)) / np.maximum(members, 1.0)
    votes = per_class(weights)
    # Sums of the same weights in another order differ in the last bits: that is a tie, so round it away.
    votes = np.round(votes / np.maximum(votes.max(axis=1, keepdims=True), np.finfo(np.float64).tiny), 12)
    return _top_k_success(np.where(members > 0, votes, -np.inf), success, k)


def answer_classes(
    answers: Sequence[Sequence[str | None]], key: Callable[[str], Hashable | None] | None = None
) -> NDArray[np.int64]:
    """Answers [P][N] as classes int64 [P, N]: equal numbers for equal answers, NO_ANSWER for None.

    key: maps an answer to what it is compared by (the task's own notion of equality, "72.0" and "$72" alike), or to
    None when it is no answer. None compares the strings.
    """
    if not answers or not answers[0] or len({len(row) for row in answers}) != 1:
        raise UserError("answers must hold the same number of samples, at least one, for every prompt.")
    numbers: dict[Hashable, int] = {}
    classes = np.full((len(answers), len(answers[0])), NO_ANSWER, dtype=np.int64)
    for row, samples in enumerate(answers):
        for column, answer in enumerate(samples):
            value = answer if answer is None or key is None else key(answer)
            if value is not None:
                classes[row, column] = numbers.setdefault(value, len(numbers))
    return classes


def vote_weights(scores: ArrayLike) -> Floats:
    """Votes from logit rewards, f64 [P, N]: the discriminator's probability σ(score); −inf gives no vote."""
    scores = np.asarray(scores, dtype=np.float64)
    return 1.0 / (1.0 + np.exp(-np.clip(_as_scores(scores, scores.shape), -700.0, 700.0))) * np.isfinite(scores)


def trace_scores(tokens: TokenValues, scorer: Scorer, *, gamma: float = 0.9, step_rule: StepRule = "mean") -> Floats:
    """One score per trace, f64 [S], from its token rewards (or log-probabilities).

    answer: mean over answer tokens of the discounted reward to go; −inf for a trace without answer tokens.
    mean: mean over all tokens, undiscounted. min_step: the lowest step (`step_rule` reduces a step's tokens).
    last: the last token.
    """
    starts, lengths = tokens.offsets[:-1], np.diff(tokens.offsets)
    if scorer == "mean":
        return np.add.reduceat(tokens.values, starts) / lengths
    if scorer == "last":
        return tokens.values[tokens.offsets[1:] - 1]
    if scorer == "min_step":
        steps = step_scores(tokens, step_rule)
        return np.minimum.reduceat(steps.values, steps.offsets[:-1])
    if scorer == "answer":
        if tokens.answer_mask is None:
            raise UserError("scorer answer needs answer_mask, true on the tokens of each trace's answer.")
        counts = np.add.reduceat(tokens.answer_mask, starts, dtype=np.int64)
        sums = np.add.reduceat(np.where(tokens.answer_mask, discounted_to_go(tokens, gamma), 0.0), starts)
        return np.where(counts > 0, sums / np.maximum(counts, 1), -np.inf)
    raise UserError(f"scorer {scorer!r} is unknown; choose answer, mean, min_step or last.")


def discounted_to_go(tokens: TokenValues, gamma: float) -> Floats:
    """Σ_{s≥t} γ^{s−t} r_s within each trace, f64 [M]: all traces move back from their ends together."""
    if not 0.0 <= gamma <= 1.0:
        raise UserError(f"gamma={gamma} must lie between 0 and 1.")
    lengths = np.diff(tokens.offsets)
    order = np.argsort(-lengths, kind="stable")
    last = tokens.offsets[1:][order] - 1
    alive = np.searchsorted(-lengths[order], -np.arange(lengths.max()), side="left")  # traces longer than j
    out = tokens.values.copy()
    for back in range(1, int(lengths.max())):
        rows = last[: alive[back]] - back
        out[rows] += gamma * out[rows + 1]
    return out


def _as_scores(scores: ArrayLike, shape: tuple[int, ...]) -> Floats:
    try:
        array = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError("scores must be a rectangular array of numbers.") from None
    if array.shape != shape or array.ndim != 2:
        raise UserError(f"scores must have the shape {shape} of the verdicts, but have shape {array.shape}.")
    if np.isnan(array).any() or np.isposinf(array).any():
        raise UserError("scores hold NaN or +inf; repair them, or use -inf for a sample never to be preferred.")
    return array


def _top_k_success(scores: Floats, success: Floats, k: int) -> Floats:
    """Chance, f64 [P], that one of the k highest-scored of N items succeeds; scores, success: f64 [P, N].

    Items above the k-th highest score are picked for certain; the rest of the k are drawn without replacement from
    those tied with it. `mean_miss[j]` is the mean, over all j-subsets of the tied items seen so far, of the product
    of their miss chances; a new item joins a j-subset of i items with chance j/i.
    """
    cut = np.partition(scores, -k, axis=1)[:, -k][:, None]
    miss = 1.0 - success
    above, tied = scores > cut, scores == cut
    sure_miss = np.where(above, miss, 1.0).prod(axis=1)
    draws = k - above.sum(axis=1)
    sizes = np.arange(1, k + 1)
    mean_miss = np.zeros((len(scores), k + 1))
    mean_miss[:, 0] = 1.0
    for item in range(scores.shape[1]):
        seen = tied[:, : item + 1].sum(axis=1)[:, None]
        share = np.minimum(sizes / np.maximum(seen, 1), 1.0)
        updated = (1.0 - share) * mean_miss[:, 1:] + share * miss[:, item, None] * mean_miss[:, :-1]
        mean_miss[:, 1:] = np.where(tied[:, item, None] & (sizes <= seen), updated, mean_miss[:, 1:])
    return 1.0 - sure_miss * mean_miss[np.arange(len(scores)), draws]

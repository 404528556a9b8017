"""Does the reward go with correctness? AUROC, Welch's t and Pearson correlation, pooled and within prompts.

Pooled figures mix two things: telling right from wrong traces, and telling easy from hard prompts. Only the first
helps reranking, so the within-prompt AUROC is the one to quote. Notation: S traces, P prompts, K signals.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airl_fast.errors import UserError
from airl_fast.measures.passk import (
    RESAMPLES,
    Estimate,
    Floats,
    as_finite,
    cluster_codes,
    interval,
    mean_estimate,
    resample_counts,
)

_CHUNK_ENTRIES = 4_000_000  # resampled trace weights held at once


@dataclass(frozen=True, slots=True, kw_only=True)
class WithinPromptAuroc:
    """Mean over prompts of their own AUROC, each weighing the same; None when no prompt has both classes.

    prompts: those with both a correct and a wrong trace, which count. prompts_total: all that were given.
    """

    estimate: Estimate | None
    prompts: int
    prompts_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WelchT:
    """Welch's unequal-variance t of correct against wrong per-prompt means (Welch 1947).

    t > 0 when correct traces score higher. degrees: Welch–Satterthwaite. prompts_*: how many means on each side.
    """

    t: float
    degrees: float
    mean_correct: float
    mean_wrong: float
    prompts_correct: int
    prompts_wrong: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PearsonMatrix:
    """Correlations f64 [K, K] of named signals; NaN in the row and column of a signal that never varies."""

    names: tuple[str, ...]
    values: Floats
    traces: int

    def between(self, first: str, second: str) -> float:
        """The correlation of two signals by name."""
        for name in (first, second):
            if name not in self.names:
                raise UserError(f"there is no signal {name!r}; choose from {', '.join(self.names)}.")
        return float(self.values[self.names.index(first), self.names.index(second)])


def pooled_auroc(
    scores: ArrayLike,
    correct: ArrayLike,
    *,
    prompts: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate | None:
    """Chance that a random correct trace outscores a random wrong one, ties half; None without both classes.

    scores: [S]; correct: bool [S]; prompts: labels [S] to resample by (each trace alone when None). Resamples that
    lack a class are skipped.
    """
    scores, correct = _checked(scores, correct)
    if correct.all() or not correct.any():
        return None
    codes = cluster_codes(prompts, len(scores))
    order = np.argsort(scores)
    starts = np.flatnonzero(np.concatenate(([True], np.diff(scores[order]) > 0)))  # one per distinct score
    codes, positive = codes[order], correct[order].astype(np.float64)

    def areas(weights: Floats) -> Floats:
        ups = np.add.reduceat(weights * positive, starts, axis=1)
        downs = np.add.reduceat(weights * (1.0 - positive), starts, axis=1)
        below = np.cumsum(downs, axis=1) - downs
        pairs = ups.sum(axis=1) * downs.sum(axis=1)
        with np.errstate(invalid="ignore"):
            return (ups * (below + 0.5 * downs)).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)

    draws = []
    rows = max(1, _CHUNK_ENTRIES // len(scores))
    for counts in resample_counts(int(codes.max()) + 1, resamples, seed):
        draws += [areas(counts[i : i + rows, codes]) for i in range(0, len(counts), rows)]
    return interval(float(areas(np.ones((1, len(scores))))[0]), np.concatenate(draws))


def within_prompt_auroc(
    scores: ArrayLike, correct: ArrayLike, prompts: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> WithinPromptAuroc:
    """AUROC of each prompt's own traces (ties half), averaged over prompts that have both classes.

    scores: [S]; correct: bool [S]; prompts: labels [S]. The interval resamples those prompts.
    """
    scores, correct = _checked(scores, correct)
    codes = cluster_codes(prompts, len(scores))
    order = np.lexsort((scores, codes))
    s, g, positive = scores[order], codes[order], correct[order]
    new_prompt = np.concatenate(([True], np.diff(g) > 0))
    new_value = new_prompt | np.concatenate(([True], np.diff(s) > 0))
    block = np.cumsum(new_value) - 1
    sizes = np.bincount(block)
    middle = np.cumsum(sizes) - (sizes - 1) / 2.0  # mean 1-based rank of a tied block, over all traces
    rank = middle[block] - np.flatnonzero(new_prompt)[g]
    ups = np.bincount(g, weights=positive)
    downs = np.bincount(g, weights=~positive)
    both = (ups > 0) & (downs > 0)
    total = len(ups)
    if not both.any():
        return WithinPromptAuroc(estimate=None, prompts=0, prompts_total=total)
    rank_sums = np.bincount(g, weights=np.where(positive, rank, 0.0))
    areas = (rank_sums - ups * (ups + 1) / 2.0)[both] / (ups * downs)[both]
    estimate = mean_estimate(areas, resamples=resamples, seed=seed)
    return WithinPromptAuroc(estimate=estimate, prompts=int(both.sum()), prompts_total=total)


def welch_t(scores: ArrayLike, correct: ArrayLike, prompts: ArrayLike) -> WelchT | None:
    """Welch's t between the per-prompt mean scores of correct traces and those of wrong traces.

    A prompt gives a mean to each side it has traces on. None with fewer than two prompts on a side, or when
    neither side varies.
    """
    scores, correct = _checked(scores, correct)
    codes = cluster_codes(prompts, len(scores))
    right, wrong = (_means(scores[side], codes[side]) for side in (correct, ~correct))
    if min(len(right), len(wrong)) < 2:
        return None
    a, b = right.var(ddof=1) / len(right), wrong.var(ddof=1) / len(wrong)
    if a + b == 0:
        return None
    return WelchT(
        t=float((right.mean() - wrong.mean()) / np.sqrt(a + b)),
        degrees=float((a + b) ** 2 / (a**2 / (len(right) - 1) + b**2 / (len(wrong) - 1))),
        mean_correct=float(right.mean()),
        mean_wrong=float(wrong.mean()),
        prompts_correct=len(right),
        prompts_wrong=len(wrong),
    )


def pearson_matrix(signals: Mapping[str, ArrayLike]) -> PearsonMatrix:
    """Pearson correlation of every pair of named signals [S] (reward, correctness, format checks, length …)."""
    if len(signals) < 2:
        raise UserError("a correlation needs at least two signals.")
    columns = [as_finite(f"signal {name!r}", np.asarray(v, dtype=np.float64)) for name, v in signals.items()]
    if len({len(c) for c in columns}) != 1:
        sizes = ", ".join(f"{name} {len(c)}" for name, c in zip(signals, columns, strict=True))
        raise UserError(f"every signal needs one value for each trace, but the lengths differ: {sizes}.")
    table = np.stack(columns)
    varies = table.max(axis=1) > table.min(axis=1)
    centred = table - table.mean(axis=1, keepdims=True)
    norms = np.where(varies, np.sqrt((centred**2).sum(axis=1)), np.nan)
    unit = centred / norms[:, None]
    values = np.clip(unit @ unit.T, -1.0, 1.0)
    np.fill_diagonal(values, np.where(varies, 1.0, np.nan))
    return PearsonMatrix(names=tuple(signals), values=values, traces=table.shape[1])


def _checked(scores: ArrayLike, correct: ArrayLike) -> tuple[Floats, NDArray[np.bool_]]:
    scores = as_finite("scores", scores)
    verdicts = np.asarray(correct)
    if verdicts.shape != scores.shape or verdicts.dtype != np.bool_:
        raise UserError(f"correct must be bool [{len(scores)}] like scores, but is {verdicts.dtype} {verdicts.shape}.")
    return scores, verdicts


def _means(scores: Floats, codes: NDArray[np.int64]) -> Floats:
    """Mean score of every prompt that has traces here."""
    counts = np.bincount(codes)
    return np.bincount(codes, weights=scores)[counts > 0] / counts[counts > 0]

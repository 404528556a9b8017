"""pass@k without bias, and the bootstrap interval that every evaluation figure carries.

pass@k is the chance that at least one of k samples drawn without replacement from the n at hand is correct
(Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1). Intervals are percentile
bootstraps over *prompts*: samples of one prompt are not independent, so they are resampled together.
Notation: P prompts, n samples a prompt, I items (prompts or traces), C clusters, R resamples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airl_fast.errors import UserError

Floats = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK_ENTRIES = 4_000_000  # resample counts held at once: 32 MB of float64


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its 95% interval, in the figure's own unit (pass rates as fractions in 0..1).

    The percentile bootstrap has zero width when every item agrees (all right or all wrong): that is a limit of
    the method, not certainty.
    """

    value: float
    low: float
    high: float


def as_correct(correct: ArrayLike) -> NDArray[np.bool_]:
    """Check verdicts: bool [P, n] (0 and 1 pass too) with at least one prompt and one sample."""
    array = np.asarray(correct)
    if array.ndim != 2 or 0 in array.shape:
        raise UserError(f"correct must be [prompts, samples] with at least one of each, but has shape {array.shape}.")
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "iuf" or not np.isin(array, (0, 1)).all():
        raise UserError("correct must hold only true/false (or 0/1); replace missing verdicts before evaluating.")
    return array.astype(np.bool_)


def as_finite(name: str, values: ArrayLike, ndim: int = 1) -> Floats:
    """Check a float array: `ndim` axes, not empty, no NaN and no infinity."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a rectangular array of numbers.") from None
    if array.ndim != ndim or array.size == 0:
        raise UserError(f"{name} must be a non-empty array of {ndim} axis(es), but has shape {array.shape}.")
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise UserError(f"{name} holds {bad} NaN or infinite value(s); remove or repair them before evaluating.")
    return array


def pass_at_k_per_prompt(correct: ArrayLike, k: int) -> Floats:
    """Unbiased pass@k of every prompt, f64 [P], from verdicts bool [P, n]. UserError unless 1 <= k <= n."""
    correct = as_correct(correct)
    n = correct.shape[1]
    check_k(k, n)
    wrong = n - correct.sum(axis=1)
    miss = np.ones(len(wrong))
    for drawn in range(k):  # C(wrong, k) / C(n, k) as a product of ratios: no overflow, and 0 once wrong ones run out
        miss *= (wrong - drawn) / (n - drawn)
    return 1.0 - miss


def pass_at_k(correct: ArrayLike, k: int, *, resamples: int = RESAMPLES, seed: int = 0) -> Estimate:
    """Mean unbiased pass@k over prompts with its interval. `correct`: bool [P, n]."""
    return mean_estimate(pass_at_k_per_prompt(correct, k), resamples=resamples, seed=seed)


def pass_at_ks(
    correct: ArrayLike, ks: Sequence[int], *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[int, Estimate]:
    """pass@k for several k, every k on the same resamples."""
    return {k: pass_at_k(correct, k, resamples=resamples, seed=seed) for k in ks}


def check_k(k: int, n: int) -> None:
    """UserError unless 1 <= k <= n."""
    if not 1 <= k <= n:
        raise UserError(f"k={k} must lie between 1 and the number of samples a prompt, {n}; draw more or lower k.")


def mean_estimate(
    values: ArrayLike, *, clusters: ArrayLike | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Estimate:
    """Mean of f64 [I] with a bootstrap interval.

    clusters: [I] labels of any sortable type; items that share one are resampled together (traces of a prompt).
    None makes every item its own cluster. Equal seeds and clusters give equal resamples, so figures are paired.
    """
    columns = as_finite("values", values)[:, None]
    return mean_estimates(columns, clusters=clusters, resamples=resamples, seed=seed)[0]


def mean_estimates(
    columns: Floats, *, clusters: ArrayLike | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> list[Estimate]:
    """`mean_estimate` of each column of f64 [I, N], all on one drawing of the resamples."""
    codes = cluster_codes(clusters, len(columns))
    sizes = np.bincount(codes).astype(np.float64)
    sums = np.stack([np.bincount(codes, weights=column) for column in columns.T], axis=1)
    draws = np.concatenate([(c @ sums) / (c @ sizes)[:, None] for c in resample_counts(len(sizes), resamples, seed)])
    return [interval(float(column.mean()), drawn) for column, drawn in zip(columns.T, draws.T, strict=True)]


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of first − second over the same items, f64 [I] each; its interval leaves out what both share."""
    first, second = as_finite("first", first), as_finite("second", second)
    if first.shape != second.shape:
        raise UserError(f"a paired difference needs the same items twice, but got {len(first)} and {len(second)}.")
    return mean_estimate(first - second, clusters=clusters, resamples=resamples, seed=seed)


def cluster_codes(clusters: ArrayLike | None, items: int) -> NDArray[np.int64]:
    """Labels [I] as codes 0..C−1, int64 [I]; None gives each item its own."""
    if clusters is None:
        return np.arange(items)
    clusters = np.asarray(clusters)
    if clusters.shape != (items,):
        raise UserError(f"there must be one prompt label for each of {items} items, but got shape {clusters.shape}.")
    return np.unique(clusters, return_inverse=True)[1]


def resample_counts(clusters: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each of C clusters is drawn, in chunks of f64 [r, C] whose r add up to `resamples`.

    Drawing with replacement C times is one multinomial draw, so a resampled mean is a matrix product.
    """
    if resamples < 1:
        raise UserError(f"resamples={resamples} must be at least 1.")
    rng = np.random.default_rng(seed)
    shares = np.full(clusters, 1.0 / clusters)
    chunk = max(1, _CHUNK_ENTRIES // clusters)
    for start in range(0, resamples, chunk):
        yield rng.multinomial(clusters, shares, size=min(chunk, resamples - start)).astype(np.float64)


def interval(value: float, draws: Floats) -> Estimate:
    """The percentile interval of resampled figures f64 [R] around `value`; NaN draws (undefined there) are skipped."""
    tail = (1.0 - LEVEL) / 2.0
    low, high = np.nanquantile(draws, [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high))

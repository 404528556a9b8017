"""Where does a trace go wrong first? Step scores from token values, rules that name a step, and what chance scores.

A rule turns the step scores of a trace into a *suspicion* per step; the predicted first wrong step is the most
suspicious one. The same rules run on rewards and on log-probabilities, which is the baseline to beat. Ties are
resolved by their exact expectation, never by position. Notation: M tokens, S traces, K steps of all traces.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from airl_fast.errors import UserError
from airl_fast.measures.passk import RESAMPLES, Estimate, Floats, as_finite, mean_estimate

Ints = NDArray[np.int64]
StepRule = Literal["mean", "min"]
Rule = Literal["largest_drop", "argmin", "first_below"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenValues:
    """One number per completion token (reward or log-probability) of S packed traces.

    values: f64 [M]. offsets: int64 [S+1], trace s owns values[offsets[s]:offsets[s+1]], never empty.
    step_ends: bool [M], true on the last token of each step; a trace's last token always closes one, marked or not.
    answer_mask: bool [M], true on the tokens of the final answer, or None when no scorer needs it.
    """

    values: Floats
    offsets: Ints
    step_ends: NDArray[np.bool_]
    answer_mask: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        """Check and convert. UserError names the field that does not fit."""
        values = as_finite("token values", self.values)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "offsets", _checked_offsets(self.offsets, len(values)))
        for name in ("step_ends", "answer_mask"):
            mask = getattr(self, name)
            if mask is None and name == "answer_mask":
                continue
            mask = np.asarray(mask)
            if mask.shape != values.shape or mask.dtype != np.bool_:
                raise UserError(
                    f"{name} must be bool [{len(values)}], one per token, but is {mask.dtype} {mask.shape}."
                )
            object.__setattr__(self, name, mask)
        ends = self.step_ends.copy()
        ends[self.offsets[1:] - 1] = True
        object.__setattr__(self, "step_ends", ends)

    @staticmethod
    def from_traces(
        values: Sequence[ArrayLike], step_ends: Sequence[ArrayLike], answer_mask: Sequence[ArrayLike] | None = None
    ) -> "TokenValues":
        """Pack one array per trace, S of each."""
        if not len(values) or any(len(np.asarray(v)) == 0 for v in values):
            raise UserError("values must hold at least one trace, and every trace at least one token.")
        return TokenValues(
            values=np.concatenate([np.asarray(v, dtype=np.float64) for v in values]),
            offsets=np.concatenate(([0], np.cumsum([len(np.asarray(v)) for v in values]))),
            step_ends=np.concatenate([np.asarray(e, dtype=np.bool_) for e in step_ends]),
            answer_mask=None
            if answer_mask is None
            else np.concatenate([np.asarray(a, dtype=np.bool_) for a in answer_mask]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepScores:
    """One number per step: values f64 [K]; offsets int64 [S+1], trace s owns values[offsets[s]:offsets[s+1]]."""

    values: Floats
    offsets: Ints

    def __post_init__(self) -> None:
        """Check and convert."""
        object.__setattr__(self, "values", as_finite("step scores", self.values))
        object.__setattr__(self, "offsets", _checked_offsets(self.offsets, len(self.values)))

    @property
    def lengths(self) -> Ints:
        """Number of steps of every trace, int64 [S]."""
        return np.diff(self.offsets)

    @property
    def traces(self) -> Ints:
        """The trace each step belongs to, int64 [K]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def indices(self) -> Ints:
        """Index of each step within its trace, int64 [K]."""
        return np.arange(len(self.values)) - np.repeat(self.offsets[:-1], self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHits:
    """How well each of the S' traces that hold a wrong step was localised; f64 [S'] each, expectations under ties.

    rows: int64 [S'], the position of each among the traces given, to look up its prompt.
    """

    hit_at_1: Floats
    hit_within_1: Floats
    reciprocal_rank: Floats
    rows: Ints


@dataclass(frozen=True, slots=True, kw_only=True)
class Localisation:
    """Hit@1, Hit@±1 and mean reciprocal rank over `traces` traces that hold a wrong step."""

    hit_at_1: Estimate
    hit_within_1: Estimate
    mrr: Estimate
    traces: int


def step_scores(tokens: TokenValues, rule: StepRule = "mean") -> StepScores:
    """Reduce the tokens of every step to one score: their mean, or their minimum."""
    starts = np.concatenate(([0], np.flatnonzero(tokens.step_ends)[:-1] + 1))
    if rule == "mean":
        values = np.add.reduceat(tokens.values, starts) / np.diff(np.append(starts, len(tokens.values)))
    elif rule == "min":
        values = np.minimum.reduceat(tokens.values, starts)
    else:
        raise UserError(f"step rule {rule!r} is unknown; choose mean or min.")
    return StepScores(values=values, offsets=np.searchsorted(starts, tokens.offsets))


def step_of_token(tokens: TokenValues, token: ArrayLike) -> Ints:
    """The step that holds a token: int64 [S] from its index within each trace, −1 stays −1 (no such token)."""
    token = np.asarray(token, dtype=np.int64)
    lengths = np.diff(tokens.offsets)
    if token.shape != lengths.shape or (token < -1).any() or (token >= lengths).any():
        raise UserError("token must give each trace an index within its tokens, or -1 for none.")
    closed = np.concatenate(([0], np.cumsum(tokens.step_ends)))  # steps closed before each token
    start = tokens.offsets[:-1]
    return np.where(token < 0, -1, closed[start + np.maximum(token, 0)] - closed[start])


def suspicion(steps: StepScores, rule: Rule, threshold: float | None = None) -> Floats:
    """How suspicious each step is, f64 [K], higher is more; only the order within a trace has meaning.

    largest_drop: fall from the step before; the first step, which has none, from the trace's mean step.
    argmin: the lowest score. first_below: the earliest score < threshold, and the lowest when none is below.
    """
    starts = steps.offsets[:-1]
    if rule == "largest_drop":
        before = np.concatenate(([0.0], steps.values[:-1]))
        before[starts] = np.add.reduceat(steps.values, starts) / steps.lengths
        return before - steps.values
    if rule == "argmin":
        return -steps.values
    if rule == "first_below":
        if threshold is None or not np.isfinite(threshold):
            raise UserError("rule first_below needs a finite threshold; calibrate one on separate traces.")
        highest = np.repeat(np.maximum.reduceat(-steps.values, starts), steps.lengths)
        left = np.repeat(steps.lengths, steps.lengths) - steps.indices
        return np.where(steps.values < threshold, highest + left, -steps.values)
    raise UserError(f"localisation rule {rule!r} is unknown; choose largest_drop, argmin or first_below.")


def position_suspicion(steps: StepScores, reference_truth: ArrayLike) -> Floats:
    """The majority-position baseline, f64 [K]: how often each position is the wrong one in `reference_truth`.

    reference_truth: int64 of any length, −1 for none. With the evaluated labels themselves this is the most that
    guessing by position can score; with those of other traces it is an honest baseline.
    """
    truth = np.asarray(reference_truth, dtype=np.int64)
    counts = np.bincount(truth[truth >= 0], minlength=int(steps.lengths.max()))
    return counts[steps.indices].astype(np.float64)


def calibrate_threshold(steps: StepScores, truth: ArrayLike) -> float:
    """The threshold that maximises Hit@1 of `first_below` on these traces, which must not be the evaluated ones.

    truth: int64 [S], −1 for traces without a wrong step (not used). Exact: with truth t the rule is right for
    thresholds in (score_t, lowest score before t], and, when nothing is below, if score_t is the lowest. Among
    equally good thresholds the median one is taken.
    """
    rows, truth = _with_error(steps, truth)
    starts = steps.offsets[:-1][rows]
    score = steps.values[starts + truth]
    lowest = np.minimum.reduceat(steps.values, steps.offsets[:-1])
    ties = np.add.reduceat(steps.values == np.repeat(lowest, steps.lengths), steps.offsets[:-1], dtype=np.int64)[rows]
    lowest = lowest[rows]
    fallback = np.where(score == lowest, 1.0 / ties, 0.0)
    full_truth = np.zeros(len(steps.lengths), dtype=np.int64)
    full_truth[rows] = truth
    earlier = np.where(steps.indices < full_truth[steps.traces], steps.values, np.inf)
    before = np.minimum.reduceat(earlier, steps.offsets[:-1])[rows]
    usable = score < before
    low, high = np.sort(score[usable]), np.sort(before[usable])
    edges = np.unique(np.concatenate((low, high[np.isfinite(high)], lowest)))
    candidates = np.concatenate(([edges[0] - 1.0], (edges[:-1] + edges[1:]) / 2.0, [edges[-1] + 1.0]))
    order = np.argsort(lowest)
    fallback_above = np.append(np.cumsum(fallback[order][::-1])[::-1], 0.0)
    hits = np.searchsorted(low, candidates, "left") - np.searchsorted(high, candidates, "left")
    hits = hits + fallback_above[np.searchsorted(lowest[order], candidates, "left")]
    best = np.flatnonzero(np.isclose(hits, hits.max(), rtol=0.0, atol=1e-9))
    return float(candidates[best[len(best) // 2]])


def trace_hits(steps: StepScores, suspicion_: ArrayLike, truth: ArrayLike) -> TraceHits:
    """Compare a suspicion per step, f64 [K], with the first wrong step of each trace, int64 [S] (−1: none).

    Traces without a wrong step are left out. Tied steps share their ranks in every order with equal chance.
    """
    level = as_finite("suspicion", suspicion_)
    if level.shape != steps.values.shape:
        raise UserError(f"suspicion must hold one value for each of {len(steps.values)} steps, but has {len(level)}.")
    rows, truth = _with_error(steps, truth)
    starts, traces, indices = steps.offsets[:-1], steps.traces, steps.indices
    full_truth = np.full(len(starts), -1)
    full_truth[rows] = truth
    top = level == np.repeat(np.maximum.reduceat(level, starts), steps.lengths)
    tops = np.add.reduceat(top.astype(np.int64), starts)
    distance = np.abs(indices - full_truth[traces])
    hit = np.add.reduceat((top & (distance == 0)).astype(np.float64), starts) / tops
    near = np.add.reduceat((top & (distance <= 1)).astype(np.float64), starts) / tops
    of_truth = np.repeat(level[starts + np.maximum(full_truth, 0)], steps.lengths)
    above = np.add.reduceat((level > of_truth).astype(np.int64), starts)
    tied = np.add.reduceat((level == of_truth).astype(np.int64), starts)
    harmonic = _harmonic(int(steps.lengths.max()))
    rank = (harmonic[above + tied] - harmonic[above]) / tied
    return TraceHits(hit_at_1=hit[rows], hit_within_1=near[rows], reciprocal_rank=rank[rows], rows=rows)


def chance_hits(steps: StepScores, truth: ArrayLike) -> TraceHits:
    """What a guess at random scores in expectation, exactly, from each trace's own number of steps L.

    Hit@1 is 1/L, Hit@±1 the share of steps within one of the truth, the reciprocal rank H_L / L.
    """
    rows, truth = _with_error(steps, truth)
    length = steps.lengths[rows]
    near = 1.0 + (truth > 0) + (truth < length - 1)
    rank = _harmonic(int(length.max()))[length] / length
    return TraceHits(hit_at_1=1.0 / length, hit_within_1=near / length, reciprocal_rank=rank, rows=rows)


def summarise_hits(
    hits: TraceHits, *, prompts: ArrayLike | None = None, resamples: int = RESAMPLES, seed: int = 0
) -> Localisation:
    """Means over traces with bootstrap intervals; `prompts` [S] labels all traces given, to resample by prompt."""
    clusters = None if prompts is None else np.asarray(prompts)[hits.rows]
    hit, near, rank = (
        mean_estimate(v, clusters=clusters, resamples=resamples, seed=seed)
        for v in (hits.hit_at_1, hits.hit_within_1, hits.reciprocal_rank)
    )
    return Localisation(hit_at_1=hit, hit_within_1=near, mrr=rank, traces=len(hits.rows))


def _checked_offsets(offsets: ArrayLike, total: int) -> Ints:
    array = np.asarray(offsets)
    if array.ndim != 1 or len(array) < 2 or array.dtype.kind not in "iu":
        raise UserError("offsets must be a list of whole numbers, one more than there are traces.")
    if array[0] != 0 or array[-1] != total or (np.diff(array.astype(np.int64)) < 1).any():
        raise UserError(f"offsets must rise strictly from 0 to {total}: every trace needs at least one value.")
    return array.astype(np.int64)


def _with_error(steps: StepScores, truth: ArrayLike) -> tuple[Ints, Ints]:
    """Rows of the traces that hold a wrong step, and its index, int64 [S'] each."""
    array = np.asarray(truth)
    if array.shape != steps.lengths.shape or array.dtype.kind not in "iu":
        raise UserError(f"truth must be a whole number for each of {len(steps.lengths)} traces, -1 for no wrong step.")
    array = array.astype(np.int64)
    if (array < -1).any() or (array >= steps.lengths).any():
        row = int(np.flatnonzero((array < -1) | (array >= steps.lengths))[0])
        raise UserError(f"trace {row} has {steps.lengths[row]} steps, so its first wrong step cannot be {array[row]}.")
    rows = np.flatnonzero(array >= 0)
    if not len(rows):
        raise UserError("no trace has a wrong step, so there is nothing to localise; give traces with errors.")
    return rows, array[rows]


def _harmonic(n: int) -> Floats:
    """H_0 … H_n."""
    return np.concatenate(([0.0], np.cumsum(1.0 / np.arange(1, n + 1))))

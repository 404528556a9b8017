"""How well first wrong steps were named, and errors noticed, over a whole file and by its groups.

Naming a step in a trace without an error is a false alarm, so beside Hit@1 there is detection: does the most
suspicious step of a trace tell that the trace has an error at all?
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from airl_fast.config import EvaluateConfig
from airl_fast.data.trace_rows import NO_ERROR
from airl_fast.judge.locate import SIGNALS, Thresholds, hits_by_name
from airl_fast.measures.correlate import WithinPromptAuroc, pooled_auroc, within_prompt_auroc
from airl_fast.measures.localise import Ints, Localisation, StepScores, suspicion
from airl_fast.measures.passk import Estimate, Floats, mean_estimate, mean_estimates

UNKNOWN = -2  # a first wrong step, or a verdict, that the file does not say
EVERYTHING = "all"
DOUBTS = ("lowest_step", "largest_drop")  # what a trace's most suspicious step is taken by, when traces are compared
LENGTH = "number_of_steps"  # the baseline: a longer trace has more places to go wrong in


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """S labelled traces by the scores of their steps alone. steps: by signal, `evaluate.step_score` of the run.

    truth: int64 [S], the first wrong step among the scored ones, NO_ERROR or UNKNOWN. right: int64 [S], whether the
    answer is (1, 0, UNKNOWN). prompts: int64 [S], equal for traces of one prompt. groups: int64 [S], index into names.
    """

    steps: Mapping[str, StepScores]
    truth: Ints
    right: Ints
    prompts: Ints
    groups: Ints
    names: tuple[str, ...]

    def rows(self, chosen: NDArray[np.bool_]) -> "Labelled":
        """The traces that are chosen, bool [S]."""
        return Labelled(
            steps={name: _rows(each, chosen) for name, each in self.steps.items()},
            truth=self.truth[chosen],
            right=self.right[chosen],
            prompts=self.prompts[chosen],
            groups=self.groups[chosen],
            names=self.names,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """AUROC of a number a trace, the higher the more suspicious, for traces with an error against those without.

    pooled: over all pairs of traces. within: over pairs of one prompt, which no difference between prompts can help.
    """

    pooled: Estimate
    within: WithinPromptAuroc


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One group, or everything. wrong, without: traces with and without an error, by `error`: a wrong step, or (where
    the file says of no trace which step is wrong) a wrong answer.

    localise: as `locate.locate`; empty without a known wrong step. detect: by "SIGNAL_DOUBT" and LENGTH, empty unless
    there are traces of both kinds. alarms: share of traces with a step below the reward's threshold, of the "wrong"
    and of those "without".
    """

    name: str
    error: str
    traces: int
    wrong: int
    without: int
    localise: Mapping[str, Localisation] = field(default_factory=dict)
    detect: Mapping[str, Detection] = field(default_factory=dict)
    alarms: Mapping[str, Estimate] = field(default_factory=dict)


def measure(given: Labelled, settings: EvaluateConfig, thresholds: Thresholds) -> tuple[Section, ...]:
    """Everything first, then each group where there are several, in order of their first trace."""
    by_step = bool((given.truth != UNKNOWN).any())
    sections = [_section(EVERYTHING, given, settings, thresholds, by_step)]
    present = list(dict.fromkeys(given.groups.tolist()))
    if len(present) > 1:
        sections += [
            _section(given.names[g], given.rows(given.groups == g), settings, thresholds, by_step) for g in present
        ]
    return tuple(sections)


def _section(name: str, given: Labelled, settings: EvaluateConfig, thresholds: Thresholds, by_step: bool) -> Section:
    known = given.truth != UNKNOWN if by_step else given.right != UNKNOWN
    labels = given.rows(known) if known.any() else None
    error = "a wrong step" if by_step else "a wrong answer"
    if labels is None:
        return Section(name=name, error=error, traces=len(given.truth), wrong=0, without=0)
    wrong = labels.truth != NO_ERROR if by_step else labels.right == 0
    hits = hits_by_name(labels.steps, labels.truth, settings, thresholds) if by_step else {}
    return Section(
        name=name,
        error=error,
        traces=len(given.truth),
        wrong=int(wrong.sum()),
        without=int((~wrong).sum()),
        localise=_localisations(
            {n: (h.hit_at_1, h.hit_within_1, h.reciprocal_rank) for n, h in hits.items()}, labels, wrong
        ),
        detect=_detections(labels, wrong),
        alarms=_alarms(labels, wrong, thresholds.get("reward")),
    )


def _localisations(
    hits: Mapping[str, Sequence[Floats]], labels: Labelled, wrong: NDArray[np.bool_]
) -> dict[str, Localisation]:
    if not hits:
        return {}
    columns = np.stack([values for each in hits.values() for values in each], axis=1)
    found = mean_estimates(columns, clusters=labels.prompts[wrong])
    return {
        name: Localisation(hit_at_1=a, hit_within_1=b, mrr=c, traces=int(wrong.sum()))
        for name, (a, b, c) in zip(hits, zip(*[iter(found)] * 3, strict=True), strict=True)
    }


def _detections(labels: Labelled, wrong: NDArray[np.bool_]) -> dict[str, Detection]:
    if wrong.all() or not wrong.any():
        return {}
    doubts = {f"{signal}_{doubt}": worst(labels.steps[signal], doubt) for signal in SIGNALS for doubt in DOUBTS}
    doubts[LENGTH] = labels.steps["reward"].lengths.astype(np.float64)
    return {
        name: Detection(
            pooled=pooled_auroc(scores, wrong, prompts=labels.prompts),
            within=within_prompt_auroc(scores, wrong, labels.prompts),
        )
        for name, scores in doubts.items()
    }


def worst(steps: StepScores, doubt: str) -> Floats:
    """f64 [S]: the suspicion of each trace's most suspicious step, comparable between traces."""
    levels = suspicion(steps, "largest_drop" if doubt == "largest_drop" else "argmin")
    return np.maximum.reduceat(levels, steps.offsets[:-1])


def _alarms(labels: Labelled, wrong: NDArray[np.bool_], threshold: float | None) -> dict[str, Estimate]:
    if threshold is None:
        return {}
    below = (-worst(labels.steps["reward"], "lowest_step") < threshold).astype(np.float64)
    sides = {"wrong": wrong, "without": ~wrong}
    return {
        name: mean_estimate(below[side], clusters=labels.prompts[side]) for name, side in sides.items() if side.any()
    }


def _rows(steps: StepScores, chosen: NDArray[np.bool_]) -> StepScores:
    lengths = steps.lengths
    return StepScores(
        values=steps.values[np.repeat(chosen, lengths)], offsets=np.concatenate(([0], np.cumsum(lengths[chosen])))
    )

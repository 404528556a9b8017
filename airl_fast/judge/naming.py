"""By which rule a trace's first wrong step is named, and where the rule's threshold comes from."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from airl_fast.config import EvaluateConfig
from airl_fast.errors import UserError
from airl_fast.judge.judge import Judge, Scored
from airl_fast.judge.locate import Thresholds, calibrate, suspicious_steps
from airl_fast.lab import load_material
from airl_fast.measures.localise import Ints, step_scores
from airl_fast.measures.passk import Floats

GIVEN, CALIBRATED = "--threshold", "perturbed training demonstrations of the run"


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """settings: their `localise` is the rule. thresholds: of rule first_below by signal, empty when it is not used.
    origin: GIVEN or CALIBRATED; None without thresholds."""

    settings: EvaluateConfig
    thresholds: Thresholds
    origin: str | None

    @property
    def rule(self) -> str:
        return self.settings.localise

    @property
    def threshold(self) -> float | None:
        """The reward's, where the rule has one."""
        return self.thresholds.get("reward") if self.rule == "first_below" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedTrace:
    """K steps of a trace: score f64 [K], their reward by `step_score`; suspicion f64 [K], higher is more, comparable
    within the trace; rank: int64 [K], 1 for the most suspicious, equals share the best. step: the first of rank 1.

    below_threshold: whether any score is; False is rule first_below's way to say that nothing looks wrong. None for
    rules without a threshold.
    """

    score: Floats
    suspicion: Floats
    rank: Ints
    step: int
    below_threshold: bool | None


def naming(judge: Judge, rule: str | None, threshold: float | None) -> Naming:
    """rule: None for the run's `evaluate.localise`. threshold: None calibrates it where the rule has one. UserError
    when it cannot be calibrated, and for a threshold with another rule."""
    settings = judge.config.evaluate if rule is None else judge.config.evaluate.model_copy(update={"localise": rule})
    if settings.localise != "first_below":
        if threshold is not None:
            raise UserError(f"--threshold: rule {settings.localise} has none; give it with --rule first_below.")
        return Naming(settings=settings, thresholds={}, origin=None)
    if threshold is not None:
        if not np.isfinite(threshold):
            raise UserError(f"--threshold {threshold}: give a finite number.")
        return Naming(settings=settings, thresholds={"reward": threshold}, origin=GIVEN)
    try:
        thresholds = calibrated(judge)
    except UserError as error:
        raise UserError(f"{error}; give --threshold X, or take --rule largest_drop or --rule argmin.") from None
    return Naming(settings=settings, thresholds=thresholds, origin=CALIBRATED)


def calibrated(judge: Judge) -> Thresholds:
    """Thresholds from the run's training data. UserError, without advice, when there are none."""
    try:
        demonstrations = load_material(judge.config).train
    except UserError as error:
        raise UserError(
            f"rule first_below takes its threshold from the run's training data ({str(error).rstrip('.')})"
        ) from None
    thresholds = calibrate(judge, demonstrations)
    if not thresholds:
        raise UserError("rule first_below has no threshold: no training demonstration can be perturbed")
    return thresholds


def named(scored: Scored, chosen: Naming) -> list[NamedTrace]:
    """One entry a trace."""
    steps = step_scores(scored.reward, chosen.settings.step_score)
    suspects = suspicious_steps(scored, chosen.settings, chosen.thresholds)
    found = []
    for start, end in pairwise(suspects.offsets):
        score, levels = steps.values[start:end], suspects.values[start:end]
        found.append(
            NamedTrace(
                score=score,
                suspicion=levels,
                rank=1 + (levels[None, :] > levels[:, None]).sum(axis=1),
                step=int(np.argmax(levels)),
                below_threshold=None if chosen.threshold is None else bool((score < chosen.threshold).any()),
            )
        )
    return found

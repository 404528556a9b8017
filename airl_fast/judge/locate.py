"""Name the first wrong step of scored traces, and measure it beside what it has to beat.

Baselines: an exact random guess, the most frequent position, and the log-probability of the policy under the same rule
with a threshold of its own. Thresholds come from perturbed training demonstrations, never from evaluated labels.
"""

from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
from numpy.typing import ArrayLike

from airl_fast.config import EvaluateConfig
from airl_fast.data.task import LocatesErrors, Task
from airl_fast.judge.judge import Judge, Scored
from airl_fast.measures.localise import (
    Ints,
    Localisation,
    Rule,
    StepScores,
    TraceHits,
    calibrate_threshold,
    chance_hits,
    position_suspicion,
    step_of_token,
    step_scores,
    summarise_hits,
    suspicion,
    trace_hits,
)
from airl_fast.traces import TraceMaker
from airl_fast.types import Example, Trace

SIGNALS = ("reward", "logprob")
Thresholds = Mapping[str, float]
_ROOM = " 00000000"  # about what a perturbation with its carried error can add


def calibrate(judge: Judge, demonstrations: Sequence[Example]) -> Thresholds:
    """The threshold of rule first_below for each signal, from perturbed copies of the first `evaluate.prompts` training
    demonstrations, or those of them that fit the contexts; empty when none of them can be perturbed."""
    broken = judge.perturbed(readable(judge, demonstrations[: judge.config.evaluate.prompts]))
    if broken is None:
        return {}
    truth = changed_steps(judge.maker, broken)
    rule = judge.config.evaluate.step_score
    return {name: calibrate_threshold(step_scores(getattr(broken, name), rule), truth) for name in SIGNALS}


def readable(judge: Judge, examples: Sequence[Example]) -> list[Example]:
    """Those with a demonstration that fits the contexts, with room for an error that makes it longer."""
    found = []
    for example in examples:
        if example.expert is None:
            continue
        trace = judge.maker.expert(example, 0)
        longer = judge.trace(example, 0, trace.text + _ROOM)
        if judge.excess([longer], [example]) is None:
            found.append(example)
    return found


def suspicious_steps(scored: Scored, settings: EvaluateConfig, thresholds: Thresholds) -> StepScores:
    """How suspicious the reward finds each step by the run's own rule (`evaluate.localise`), higher is more."""
    steps = step_scores(scored.reward, settings.step_score)
    return StepScores(values=suspicion(steps, settings.localise, thresholds.get("reward")), offsets=steps.offsets)


def locate(
    scored: Scored,
    truth: ArrayLike,
    settings: EvaluateConfig,
    thresholds: Thresholds,
    *,
    prompts: ArrayLike | None = None,
) -> dict[str, Localisation]:
    """Hit@1, Hit@±1 and MRR by name: `reward` and `logprob` by the run's own rule, `reward_RULE` and `logprob_RULE`
    by the others, `chance`, and `majority_position` (the most that guessing by position can score on these labels).

    truth: int64 [S], the first wrong step, -1 for none. prompts: labels [S] to resample by. Empty when no trace has a
    wrong step. Rule first_below is left out where nothing could be calibrated.
    """
    steps = {name: step_scores(getattr(scored, name), settings.step_score) for name in SIGNALS}
    hits = hits_by_name(steps, truth, settings, thresholds)
    return {name: summarise_hits(each, prompts=prompts) for name, each in hits.items()}


def hits_by_name(
    steps: Mapping[str, StepScores], truth: ArrayLike, settings: EvaluateConfig, thresholds: Thresholds
) -> dict[str, TraceHits]:
    """What `locate` measures, trace by trace, from the scores of their steps by signal."""
    truth = np.asarray(truth, dtype=np.int64)
    if not (truth >= 0).any():
        return {}
    found: dict[str, TraceHits] = {}
    for name in SIGNALS:
        for rule in get_args(Rule):
            if rule == "first_below" and name not in thresholds:
                continue
            hits = trace_hits(steps[name], suspicion(steps[name], rule, thresholds.get(name)), truth)
            found[name if rule == settings.localise else f"{name}_{rule}"] = hits
    found["chance"] = chance_hits(steps["reward"], truth)
    found["majority_position"] = trace_hits(steps["reward"], position_suspicion(steps["reward"], truth), truth)
    return found


def changed_steps(maker: TraceMaker, scored: Scored) -> Ints:
    """int64 [S]: the step of each perturbed trace that holds its first perturbed character."""
    tokens = [maker.token_at(trace, trace.first_changed + 1) for trace in scored.traces]
    return step_of_token(scored.reward, tokens)


def known_errors(task: Task, maker: TraceMaker, scored: Scored, examples: Sequence[Example]) -> Ints | None:
    """int64 [S]: the first wrong step of each trace, -1 where every step is right; None for a task that cannot tell."""
    if not isinstance(task, LocatesErrors):
        return None

    def token(trace: Trace) -> int:
        step = task.first_wrong_step(examples[trace.group], trace.text)
        ends = task.step_ends(trace.text)
        end = ends[step] if step is not None and step < len(ends) else len(trace.text)
        return -1 if step is None else maker.token_at(trace, end)

    return step_of_token(scored.reward, [token(trace) for trace in scored.traces])

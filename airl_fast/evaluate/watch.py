"""How a reward that is trained alone is doing, on development demonstrations that it does not learn from."""

from dataclasses import dataclass

import numpy as np

from airl_fast.judge.judge import judge_of
from airl_fast.judge.locate import changed_steps
from airl_fast.lab import Lab
from airl_fast.measures.localise import chance_hits, step_scores, suspicion, trace_hits


@dataclass(frozen=True, slots=True, kw_only=True)
class DevReward:
    """Means over perturbed development demonstrations, the same ones at every look; NaN without any.

    hit_at_1: share whose lowest step is the one that was changed. chance: what a random step scores.
    """

    hit_at_1: float
    chance: float


def watch_reward(lab: Lab) -> DevReward:
    judge = judge_of(lab, lab.reward.model, lab.reward.bridge)
    broken = judge.perturbed([example for example in lab.material.dev if example.expert is not None])
    if broken is None:
        return DevReward(hit_at_1=float("nan"), chance=float("nan"))
    steps = step_scores(broken.reward, lab.config.evaluate.step_score)
    truth = changed_steps(judge.maker, broken)
    hits = trace_hits(steps, suspicion(steps, "argmin"), truth)
    return DevReward(hit_at_1=float(np.mean(hits.hit_at_1)), chance=float(np.mean(chance_hits(steps, truth).hit_at_1)))

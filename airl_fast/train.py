"""The training loop, which reads like Algorithm 1 of Fanconi et al. (arXiv 2510.01857), its two baselines, and the
reward alone.

One step of each algorithm is one function here; everything it calls is a stage of its own. What comes before the
first step is in warmup.py, what comes after the last in evaluate/final.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

from airl_fast import grpo, sft
from airl_fast.advantage import advantages
from airl_fast.batches import (
    Replay,
    expert_traces,
    pack_for_policy,
    perturbed_traces,
    rollout_stats,
    sample_traces,
    synchronise,
)
from airl_fast.config import Config
from airl_fast.discriminator import DiscriminatorStats
from airl_fast.lab import Lab, Reward
from airl_fast.metrics import Metrics
from airl_fast.types import Kind, Trace, TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """records: named records of scalars for the log. traces: the samples to keep on disk. tokens: completion tokens
    processed."""

    records: dict[str, object]
    traces: list[Trace]
    tokens: int


def airl_step(lab: Lab, step: int, meter: Metrics, replay: Replay) -> StepResult:
    config, reward = lab.config, lab.reward
    prompts = lab.prompts(step)
    experts = expert_traces(lab, prompts)
    lab.prepare.start(perturbed_traces, lab, prompts, experts, Kind.EXPERT, step)  # while the device samples
    with meter.phase("sample"):
        traces = sample_traces(lab, prompts, config.rollout.samples_per_prompt, step, "rollout")
    known = experts + traces
    with meter.phase("perturb"):
        perturbed = lab.prepare.take() + perturbed_traces(lab, prompts, known, Kind.POLICY, step)
        old_prompts, old = replay.draw(lab, step, config.discriminator.replay_per_prompt * len(prompts), len(prompts))
        replay.add(lab, step, prompts, traces, config.discriminator.replay_per_prompt)
    with meter.phase("pack"):
        judged = reward.bridge.pack(known + perturbed + old, prompts + old_prompts)
        scored = reward.bridge.pack(known, prompts)
    lab.prepare.start(pack_for_policy, lab, known)  # while the discriminator learns
    rewards = reward.model.score(scored) if config.reward.score_before_update else None
    with meter.phase("discriminator"):
        stats = reward.learning.take() if config.discriminator.overlap else learn(reward, judged, config)
    with meter.phase("score"):
        rewards = reward.model.score(scored) if rewards is None else rewards
        rewards, batch = reward.bridge.to_policy(rewards, known, prompts), lab.prepare.take()
        advantage = advantages(rewards, batch, config.advantage, config.reward)
    with meter.phase("policy"):
        policy_stats = lab.policy.update(batch, advantage)
    if config.discriminator.overlap:  # beside the next rollout, which it does not change
        reward.learning.start(learn, reward, judged, config)
    with meter.phase("sync"):
        synced = synchronise(lab, f"step {step}")
    records = {"rollout": rollout_stats(traces), "policy": policy_stats, **synced}
    if stats is not None:
        records["discriminator"] = stats
    return StepResult(records=records, traces=traces, tokens=batch.num_loss_tokens)


def learn(reward: Reward, judged: TraceBatch, config: Config) -> DiscriminatorStats | None:
    """The discriminator's updates of one step; statistics of the last, None without any."""
    stats = None
    for _ in range(config.discriminator.updates_per_step):
        stats = reward.model.update(judged, reward.optimiser)
    return stats


def grpo_step(lab: Lab, step: int, meter: Metrics, replay: Replay) -> StepResult:
    """Group-relative policy optimisation on verifiable rewards: everything but the reward is the AIRL step's."""
    prompts = lab.prompts(step)
    with meter.phase("sample"):
        traces = sample_traces(lab, prompts, lab.config.rollout.samples_per_prompt, step, "rollout")
    with meter.phase("pack"):
        batch = pack_for_policy(lab, traces)
        rewards = grpo.verifiable_rewards(traces, lab.config.grpo)
        advantage = grpo.advantages(rewards, batch, lab.config.advantage.eps)
    with meter.phase("policy"):
        stats = lab.policy.update(batch, advantage)
    with meter.phase("sync"):
        synced = synchronise(lab, f"step {step}")
    records = {"rollout": rollout_stats(traces), "policy": stats, **synced}
    return StepResult(records=records, traces=traces, tokens=batch.num_loss_tokens)


def sft_step(lab: Lab, step: int, meter: Metrics, replay: Replay) -> StepResult:
    """Supervised learning on the same demonstrations, as many a step as AIRL has traces."""
    rollout = lab.config.rollout
    prompts = lab.prompts(step, rollout.prompts_per_step * rollout.samples_per_prompt)
    with meter.phase("policy"):
        batch = pack_for_policy(lab, expert_traces(lab, prompts))
        for _ in range(lab.config.policy.epochs):
            stats = sft.update(lab.policy.lm, batch, lab.policy.optimiser, lab.policy.budget)
    return StepResult(records={"policy": stats}, traces=[], tokens=batch.num_loss_tokens)


def reward_step(lab: Lab, step: int, meter: Metrics, replay: Replay) -> StepResult:
    """The discriminator alone: demonstrations against perturbed copies of them. No policy is sampled or updated."""
    prompts = lab.prompts(step)
    with meter.phase("perturb"):
        experts = expert_traces(lab, prompts)
        perturbed = perturbed_traces(lab, prompts, experts, Kind.EXPERT, step)
    with meter.phase("pack"):
        judged = lab.reward.bridge.pack(experts + perturbed, prompts)
    with meter.phase("discriminator"):
        stats = learn(lab.reward, judged, lab.config)
    return StepResult(records={"discriminator": stats}, traces=[], tokens=judged.num_loss_tokens)


STEPS: dict[str, Callable[[Lab, int, Metrics, Replay], StepResult]] = {
    "airl": airl_step,
    "grpo": grpo_step,
    "sft": sft_step,
    "reward": reward_step,
}


def fit(
    lab: Lab,
    first: int,
    meter: Metrics,
    replay: Replay,
    watch: Callable[[int], dict[str, object]],
    done: Callable[[int, StepResult, dict[str, float]], bool],
) -> int:
    """Steps `first` to the last; returns the last one taken.

    watch(step) adds records to a step's log. done(step, result, values) sees all of it and says whether to go on.
    """
    step = first - 1
    for step in range(first, lab.config.steps + 1):
        result = STEPS[lab.config.algorithm](lab, step, meter, replay)
        values = meter.log(step, tokens=result.tokens, **result.records, **watch(step))
        if not done(step, result, values):
            break
    return step

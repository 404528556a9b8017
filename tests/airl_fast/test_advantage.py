"""From rewards to advantages to the clipped loss, with every number written out."""

import math
import statistics
from dataclasses import replace

import pytest
import torch
from airl_kernels import ppo_loss

from airl_fast import grpo
from airl_fast.advantage import advantages
from airl_fast.config import AdvantageConfig, GrpoConfig, RewardConfig
from airl_fast.granularity import reward_scale, reward_tokens
from airl_fast.pack import Boundaries, pack
from airl_fast.types import Kind, Trace
from tests.airl_fast.model_cases import CPU, trace

DENSE = RewardConfig()


def batch_of(*lengths, groups=None, correct=None, ends=()):
    """Completions of the given lengths; `ends` holds the Boundaries of each."""
    traces = [
        trace(range(1, n + 1), group=groups[i] if groups else 0, correct=correct[i] if correct else None)
        for i, n in enumerate(lengths)
    ]
    found = {t.tokens: e for t, e in zip(traces, ends, strict=False)}
    return pack(traces, CPU, lambda t: found.get(t.tokens, Boundaries()))


def run(rewards, batch, reward=DENSE, **config):
    config = AdvantageConfig(**({"eps": 0.0} | config))
    return advantages(torch.tensor(rewards), batch, config, reward).tolist()


def test_three_sequences_from_rewards_to_the_clipped_loss():
    # One prompt: the demonstration (two tokens) and two samples (four and one tokens).
    demonstration, first, second = [5.0, 3.0], [3.0, 1.0, 5.0, 1.0], [-1.0]
    batch = pack(
        [trace((1, 2), Kind.EXPERT), trace((3, 4, 5, 6), logprobs=(0.0,) * 4), trace((7,), logprobs=(0.0,))], CPU
    )
    # Last rewards 3, 1, -1: mean 1, deviation sqrt((4 + 0 + 4) / 2) = 2.
    # Standardised: demonstration 2, 1; first 1, 0, 2, 0; second -1.
    # Discounted with 0.5, from the end: demonstration 1, then 2 + 0.5 * 1 = 2.5;
    # first 0, then 2 + 0, then 0 + 0.5 * 2 = 1, then 1 + 0.5 * 1 = 1.5; second -1.
    found = run(demonstration + first + second, batch, gamma=0.5)
    assert found == pytest.approx([2.5, 1.0, 1.5, 1.0, 2.0, 0.0, -1.0], abs=1e-6)

    # Ratios of the new to the old policy, clipped to 0.8 .. 1.2; loss = -min(ratio * A, clipped ratio * A).
    ratios = [1.0, 1.5, 1.1, 0.5, 0.7, 2.0, 0.5]
    losses = [
        -2.5,  # 1.0: nothing to clip
        -1.2,  # 1.5 * 1.0 held at 1.2 * 1.0
        -1.65,  # 1.1 * 1.5 is inside
        -0.5,  # 0.5 * 1.0 is below 0.8 * 1.0, so it counts: the clip only ever lowers the objective
        -1.4,  # 0.7 * 2.0 for the same reason
        0.0,  # no advantage, and still one of the seven tokens of the mean
        0.8,  # 0.5 * -1.0 = -0.5 is above 0.8 * -1.0, so the clip holds it at -0.8
    ]
    # d(loss)/d(log ratio) = -ratio * A where the ratio itself counts, 0 where the clip holds.
    slopes = [-2.5, 0.0, -1.65, -0.5, -1.4, 0.0, 0.0]
    logprobs = torch.tensor(ratios).log().requires_grad_()
    loss, stats = ppo_loss(logprobs, torch.zeros(7), torch.tensor(found), clip_low=0.2, clip_high=0.2, denominator=7)
    loss.backward()
    assert loss.item() == pytest.approx(sum(losses) / 7, abs=1e-6)
    assert sum(losses) / 7 == pytest.approx(-6.45 / 7)
    assert logprobs.grad.tolist() == pytest.approx([slope / 7 for slope in slopes], abs=1e-6)
    assert stats.clip_fraction.item() == pytest.approx(2 / 7)


def test_eps_and_the_floor_under_the_deviation():
    batch = batch_of(1, 1)  # last rewards 0 and 2: mean 1, deviation sqrt(2)
    assert run([0.0, 2.0], batch, eps=0.5)[1] == pytest.approx(1 / (math.sqrt(2) + 0.5))
    assert run([0.0, 2.0], batch, min_std=4.0)[1] == pytest.approx(0.25)
    assert run([0.0, 2.0], batch, min_std=0.1)[1] == pytest.approx(1 / math.sqrt(2))


def test_groups_are_standardised_apart_and_need_not_be_neighbours():
    batch = batch_of(1, 1, 2, 1, groups=[1, 0, 1, 0])
    found = run([4.0, 100.0, 7.0, 2.0, 300.0], batch, gamma=0.0)
    root = math.sqrt(2)  # two values that differ by d have mean in the middle and deviation d / sqrt(2)
    assert found == pytest.approx([1 / root, -1 / root, 4 / root, -1 / root, 1 / root], rel=1e-6)


@pytest.mark.parametrize("mode", ["discounted", "average", "leave_one_out"])
@pytest.mark.parametrize("granularity", ["dense", "interval", "sparse", "multiscale"])
def test_nothing_to_compare_gives_zeros(mode, granularity):
    reward = RewardConfig(granularity=granularity)
    assert run([3.0] * 6, batch_of(2, 3, 1), reward, mode=mode) == [0.0] * 6  # no variance
    assert run([5.0, 1.0, 2.0], batch_of(3), reward, mode=mode) == [0.0] * 3  # nobody else
    many = run([3.0] * 3 + [1.0, 2.0], batch_of(2, 1, 1, 1, groups=[0, 0, 1, 1]), reward, mode=mode, normalise=True)
    assert many[:3] == [0.0] * 3 and many[3] == -many[4] != 0


def test_average_spreads_the_standardised_mean_over_the_trace():
    # Last rewards 4 and 2: mean 3, deviation sqrt(2); first trace (3, 1) / sqrt(2), second (-1, -4, -1) / sqrt(2).
    found = run([6.0, 4.0, 2.0, -1.0, 2.0], batch_of(2, 3), mode="average")
    root = math.sqrt(2)
    assert found == pytest.approx([2 / root] * 2 + [-2 / root] * 3, rel=1e-6)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    # Means 5, 1, 3; of the others 2, 4, 3.
    found = run([6.0, 4.0, 1.0, 0.0, 3.0, 6.0], batch_of(2, 1, 3), mode="leave_one_out")
    assert found == pytest.approx([3.0, 3.0, -3.0, 0.0, 0.0, 0.0], abs=1e-6)


def test_which_tokens_carry_a_reward():
    ends = [Boundaries(steps=(1, 3), blocks=(2,)), Boundaries()]
    batch = batch_of(5, 2, ends=ends)

    def carriers(granularity):
        return reward_tokens(batch, RewardConfig(granularity=granularity)).long().tolist()

    assert carriers("dense") == [1] * 7
    assert carriers("interval") == [0, 1, 0, 1, 1, 0, 1]
    assert carriers("sparse") == [0, 0, 0, 0, 1, 0, 1]
    assert carriers("multiscale") == [0, 1, 1, 1, 1, 0, 1]
    weighted = RewardConfig(granularity="multiscale", scale_weights=(1.0, 10.0, 100.0))
    assert reward_scale(batch, weighted).tolist() == [0, 1, 10, 1, 111, 0, 111]


def test_rewards_of_steps_traces_and_scales_by_hand():
    # Last rewards 2 and -2: mean 0, deviation sqrt(8). Standardised in units of 1/sqrt(8): 4 6 2 | 1 -2.
    ends = [Boundaries(steps=(0,), blocks=(1,))]
    batch, rewards = batch_of(3, 2, ends=ends), [4.0, 6.0, 2.0, 1.0, -2.0]
    unit = 1 / math.sqrt(8)

    def found(granularity, **kw):
        reward = RewardConfig(granularity=granularity, **kw)
        return [value / unit for value in run(rewards, batch, reward, gamma=0.5)]

    assert found("dense") == pytest.approx([4 + 3 + 0.5, 7, 2, 0, -2], abs=1e-5)
    assert found("interval") == pytest.approx([4 + 0.25 * 2, 0.5 * 2, 2, -1, -2], abs=1e-5)
    assert found("sparse") == pytest.approx([0.5, 1, 2, -1, -2], abs=1e-5)
    # Step 1, block 10, trace 100: first token 4, second 10 * 6, last 111 * 2; the second trace's last 111 * -2.
    scales = found("multiscale", scale_weights=(1.0, 10.0, 100.0))
    assert scales == pytest.approx([4 + 30 + 55.5, 60 + 111, 222, -111, -222], rel=1e-6)


def test_averages_run_over_the_tokens_that_carry_a_reward():
    ends = [Boundaries(steps=(0,))]
    batch, interval = batch_of(3, 2, ends=ends), RewardConfig(granularity="interval")
    # Rewards 4 (step end), 9 (none), 2 (end) and 7 (none), -2 (end): means 3 and -2.
    rewards = [4.0, 9.0, 2.0, 7.0, -2.0]
    assert run(rewards, batch, interval, mode="leave_one_out") == pytest.approx([5.0] * 3 + [-5.0] * 2)
    root = math.sqrt(8)
    assert run(rewards, batch, interval, mode="average") == pytest.approx([3 / root] * 3 + [-2 / root] * 2)


def test_the_outcome_joins_the_last_token_of_correct_completions():
    batch = batch_of(2, 2, 1, correct=[True, None, False])
    reward = RewardConfig(outcome_weight=3.0)
    # Last rewards 1 + 3, 0, 2: mean 2, deviation 2.
    assert run([2.0, 1.0, 6.0, 0.0, 2.0], batch, reward, gamma=0.5) == pytest.approx([0.5, 1.0, 1.5, -1.0, 0.0])
    # Sparse without any learned reward: the outcome alone.
    sparse = RewardConfig(outcome_weight=1.0, granularity="sparse")
    third = 1 / math.sqrt(3)
    expected = [2 * third, 2 * third, -third, -third, -third]
    assert run([0.0] * 5, batch, sparse, gamma=1.0) == pytest.approx(expected, rel=1e-6)


def test_the_position_baseline_takes_what_all_samples_of_a_prompt_share_there():
    batch = batch_of(2, 3, 2, groups=[0, 0, 1])
    plain = run([1.0, 2.0, 3.0, 4.0, 4.0, 9.0, 9.0], batch, gamma=0.5)
    found = run([1.0, 2.0, 3.0, 4.0, 4.0, 9.0, 9.0], batch, gamma=0.5, position_baseline=True)
    mean = [(plain[0] + plain[2]) / 2, (plain[1] + plain[3]) / 2]
    assert plain[:5] != pytest.approx(found[:5])
    expected = [plain[0] - mean[0], plain[1] - mean[1], plain[2] - mean[0], plain[3] - mean[1], 0.0, 0.0, 0.0]
    assert found == pytest.approx(expected, abs=1e-6)


def test_normalised_advantages_keep_their_signs_and_have_unit_size():
    batch = batch_of(2, 3, groups=[0, 0])
    plain = run([1.0, 2.0, 3.0, 4.0, 4.0], batch)
    found = run([1.0, 2.0, 3.0, 4.0, 4.0], batch, normalise=True)
    size = math.sqrt(statistics.fmean(value**2 for value in plain))
    assert found == pytest.approx([value / size for value in plain], rel=1e-5)


def test_a_long_trace_neither_overflows_nor_loses_its_end():
    length = 5000
    rewards = [math.sin(i) for i in range(length)] + [0.0]
    found = run(rewards, batch_of(length, 1))
    mean = rewards[-2] / 2
    deviation = statistics.stdev([rewards[-2], 0.0])
    total, expected = 0.0, []
    for reward in reversed(rewards[:-1]):
        total = (reward - mean) / deviation + 0.9 * total
        expected.append(total)
    assert found[:-1] == pytest.approx(expected[::-1], rel=1e-4, abs=1e-3)


def scored(text: str, correct: bool) -> Trace:
    return Trace(group=0, kind=Kind.POLICY, prompt_tokens=(1,), tokens=(1, 2), text=text, correct=correct)


def test_grpo_adds_up_its_signals_and_compares_them_in_the_group():
    tidy = "<think>\n1 + 1 = 2\n</think>\n<answer>2</answer>"
    traces = [scored(tidy, True), scored(tidy.replace("2</a", "two</a"), False), scored("2", False)]
    config = GrpoConfig(correct=1.0, soft_format=0.25, integer=0.5)
    assert grpo.verifiable_rewards(traces, config) == [1.75, 0.25, 0.0]
    assert grpo.verifiable_rewards(traces, GrpoConfig()) == [1.0, 0.0, 0.0]
    # Mean 1/3, deviation 1/sqrt(3): (2/3, -1/3, -1/3) * sqrt(3), at every token of the trace.
    found = grpo.advantages([1.0, 0.0, 0.0], pack(traces, CPU), eps=0.0).tolist()
    root = math.sqrt(3)
    assert found == pytest.approx([2 / root] * 2 + [-1 / root] * 4, rel=1e-6)
    assert grpo.advantages([1.0, 1.0, 1.0], pack(traces, CPU), eps=1e-6).tolist() == [0.0] * 6
    other = [replace(t, group=1) for t in traces[:2]]  # another prompt's rewards do not count here
    both = grpo.advantages([1.0, 0.0, 0.0, 50.0, 60.0], pack(traces + other, CPU), eps=0.0).tolist()
    assert both == pytest.approx([2 / root] * 2 + [-1 / root] * 4 + [-math.sqrt(0.5)] * 2 + [math.sqrt(0.5)] * 2)

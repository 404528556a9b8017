"""The sync sentinel on made-up log-probabilities (tests/vllm has it before the real vLLM), and an absent vLLM."""

import importlib.util

import pytest
import torch

from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.rollout.probe import Scored, Sentinel, trainer_logprobs
from airl_fast.rollout.vllm import require
from tests.airl_fast.model_cases import language_model

TOKENS = 200


def walk(steps: int, stride: float, rounding: float, lost: float = 0.0, seed: int = 0):
    """(trainer's, sampler's) log-probabilities: the trainer's take random strides, of which the sampler follows all
    but a share; the sampler's are rounded differently every time."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> torch.Tensor:
        return scale * torch.randn(TOKENS, generator=generator)

    trainer = sampler = -3 + noise(1.0)
    yield trainer, sampler + noise(rounding)
    for _ in range(steps):
        change = noise(stride)
        trainer, sampler = trainer + change, sampler + (1 - lost) * change
        yield trainer, sampler + noise(rounding)


@pytest.mark.parametrize("rounding", [0.0, 1e-6, 1e-3, 0.03])
@pytest.mark.parametrize("stride", [0.0, 1e-5, 1e-3, 0.1])
def test_a_sampler_that_follows_is_never_stopped(stride, rounding):
    sentinel = Sentinel(ceiling=0.5)
    for step, (trainer, sampler) in enumerate(walk(300, stride, rounding)):
        stats = sentinel.judge(trainer, sampler, f"step {step}")
        assert stats.difference == pytest.approx((sampler - trainer).abs().mean().item())
        assert step == 0 or stats.moved == pytest.approx(stride * 0.8, rel=0.3, abs=1e-6)


@pytest.mark.parametrize(
    ("stride", "rounding", "lost", "latest"),
    [
        (1e-2, 1e-6, 1.0, 1),  # float32: at once
        (1e-4, 1e-6, 1.0, 1),
        (1e-3, 1e-6, 0.3, 1),  # part of the weights
        (0.3, 0.03, 1.0, 1),  # bfloat16 and a large step: at once
        (0.02, 0.03, 1.0, 100),  # and small ones: when they have added up
    ],
)
def test_a_stale_sampler_is_stopped(stride, rounding, lost, latest):
    sentinel = Sentinel(ceiling=5.0)
    pairs = walk(200, stride, rounding, lost)
    sentinel.judge(*next(pairs), "step 0")
    with pytest.raises(UserError, match=r"^the sampler is stale at step \d+: the policy's log-probabilities moved by "):
        for step, (trainer, sampler) in enumerate(pairs, 1):
            sentinel.judge(trainer, sampler, f"step {step}")
            assert step < latest


def test_an_answer_that_is_the_same_to_the_bit_gives_a_missed_push_away():
    """Below the rounding of bfloat16, which a repeated answer does not have."""
    sentinel = Sentinel(ceiling=0.5)
    (first, sampler), (second, _) = list(walk(1, 3e-3, 0.03))
    sentinel.judge(first, sampler, "step 0")
    sentinel.judge(first, sampler, "step 1")  # nothing moved: a repeated answer is right
    with pytest.raises(UserError, match=r"is stale at step 2: .* and the sampler's by 0, "):
        sentinel.judge(second, sampler.clone(), "step 2")


@pytest.mark.parametrize("wrong", [0.6, float("nan")])
def test_a_difference_above_the_ceiling_stops(wrong):
    trainer = torch.full((TOKENS,), -2.0)
    with pytest.raises(
        UserError, match=r"out of step with the policy at start: .* more than rollout\.sync_ceiling=0\.5;"
    ):
        Sentinel(ceiling=0.5).judge(trainer, trainer + wrong, "start")


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_trainers_side_is_a_plain_forward(architecture):
    lm = language_model(architecture, seed=2)
    probes = (Scored(prompt=(5, 9), completion=(1, 30, 7)), Scored(prompt=(4,), completion=(2,)))
    expected = []
    for probe in probes:
        logits = lm.model(torch.tensor([[*probe.prompt, *probe.completion]])).logits[0].log_softmax(-1)
        start = len(probe.prompt) - 1
        expected += [logits[start + i, token].item() for i, token in enumerate(probe.completion)]
    torch.testing.assert_close(trainer_logprobs(lm, probes), torch.tensor(expected), atol=1e-5, rtol=0)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_an_absent_vllm_is_one_sentence():
    config = Config.model_validate({"model": {"path": "m"}, "rollout": {"engine": "vllm"}})
    with pytest.raises(UserError, match=r"^rollout\.engine=vllm needs the package vllm, .*rollout\.engine=builtin\.$"):
        require(config, language_model())

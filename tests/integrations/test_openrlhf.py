"""The OpenRLHF adapter by its documented definitions, and, where OpenRLHF is installed, against its own functions."""

import pytest
import torch
from airl_kernels.integrations import openrlhf as adapter

from tests.integrations.peer_site import run_cases


def test_against_the_package():
    run_cases("openrlhf")


def test_log_probabilities_by_definition_leave_the_logits_alone():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    before = logits.clone()
    expected = torch.log_softmax(logits / 0.5, -1).gather(-1, labels[..., None])[..., 0]
    assert torch.allclose(adapter.log_probs_from_logits(logits, labels, 0.5), expected, atol=1e-6)
    assert torch.equal(logits, before)


def test_the_two_means_by_hand():
    """Ratio 1: the loss is minus the mean advantage, over tokens or over sequences; an empty sequence counts not."""
    logprobs = torch.full((3, 2), -1.0, requires_grad=True)
    advantages, mask = torch.tensor([[1.0, 2.0], [6.0, 9.0], [5.0, 5.0]]), torch.tensor([[1, 1], [1, 0], [0, 0]])
    old = logprobs.detach()
    tokens = adapter.PolicyLoss()(logprobs, old, advantages, mask)
    assert torch.allclose(tokens[0], torch.tensor(-3.0)) and tokens[1] == 0 and tokens[2] == 0
    assert tokens[3:] == (None, None)
    assert torch.allclose(
        adapter.PolicyLoss(token_level_loss=False)(logprobs, old, advantages, mask)[0], torch.tensor(-(1.5 + 6.0) / 2)
    )
    tokens[0].backward()
    assert torch.allclose(logprobs.grad, -advantages * mask / 3)


def test_clipping_and_drift_by_hand():
    """Ratios 2, 0.5, 2, 0.5 with ε 0.2 and 0.3: the first gains at most 1.3, the second loses at least 0.8."""
    logprobs = torch.tensor([[2.0, 0.5, 2.0, 0.5]]).log()
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0]])
    kind = adapter.PolicyLoss(clip_eps_low=0.2, clip_eps_high=0.3)
    loss, clipped, drift, *_ = kind(logprobs, torch.zeros(1, 4), advantages, None)
    assert torch.allclose(loss, torch.tensor((-1.3 + 0.8 + 2.0 - 0.5) / 4))
    assert clipped == 0.5 and torch.allclose(drift, torch.tensor(0.0), atol=1e-7)


def test_filtered_tokens_count_nothing_and_kept_ones_carry_their_weight():
    old, rollout = torch.tensor([[2.0, 1.1, 1.0]]).log(), torch.zeros(1, 3)
    kind = adapter.PolicyLoss(is_correction_level="token", is_correction_threshold=[0.9, 1.5])
    loss, _, _, kl, filtered = kind(old, old, torch.ones(1, 3), torch.ones(1, 3), rollout)
    assert torch.allclose(loss, torch.tensor(-(0.0 + 1.1 + 1.0) / 3))
    assert torch.allclose(filtered, torch.tensor(1 / 3)) and torch.allclose(kl, -old.mean())


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"policy_loss_type": "a"}, "policy_loss_type must be one of ppo, gspo; got 'a'"),
        ({"is_correction_mode": "clip", "is_correction_gating": "tv"}, "is_correction_mode=clip is for"),
        ({"is_correction_level": "seq", "is_correction_gating": "tv"}, "is_correction_gating=tv needs a lower"),
        ({"dual_clip": 1.1}, "dual_clip must be above 1"),
    ],
)
def test_settings_without_meaning_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        adapter.PolicyLoss(**setting)


def test_what_is_missing_is_named():
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="is_correction_level=token needs rollout_log_probs"):
        adapter.PolicyLoss(is_correction_level="token")(zeros, zeros, zeros, zeros)
    with pytest.raises(RuntimeError, match="openrlhf is not installed"):
        adapter.patch()

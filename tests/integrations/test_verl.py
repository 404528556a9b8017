"""The verl adapter by verl's documented definitions, and, where verl is installed, against verl itself."""

import pytest
import torch
from airl_kernels.integrations import verl as adapter

from tests.integrations.peer_site import run_cases


def test_against_the_package():
    run_cases("verl")


def test_gae_of_a_response_with_tool_output_by_hand():
    """γ = 0.5, λ = 1: the masked token in the middle is no time step, so token 0 bootstraps from token 2."""
    rewards = torch.tensor([[1.0, 9.0, 2.0, 7.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 8.0, 1.0, 6.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 0, 1, 0]])
    second = 2.0 - 1.0
    first = 1.0 + 0.5 * 1.0 - 0.5 + 0.5 * second
    mean, std = (first + second) / 2, torch.tensor([first, second]).std().item()
    advantages, returns = adapter.compute_gae_advantage_return(rewards, values, mask, 0.5, 1.0)
    expected = torch.tensor([[(first - mean) / std, 0.0, (second - mean) / std, 0.0]], dtype=torch.float64)
    assert torch.allclose(advantages, expected, atol=1e-6)
    assert torch.allclose(returns, torch.tensor([[first + 0.5, 0.0, second + 1.0, 0.0]], dtype=torch.float64))


def test_gae_takes_tensors_for_gamma_and_lambda_and_refuses_a_single_token():
    rewards, mask = torch.tensor([[1.0, 2.0, -1.0]]), torch.ones(1, 3)
    numbers = adapter.compute_gae_advantage_return(rewards, rewards, mask, 0.9, 0.8)
    tensors = adapter.compute_gae_advantage_return(rewards, rewards, mask, torch.tensor(0.9), torch.tensor(0.8))
    assert torch.allclose(numbers[0], tensors[0]) and numbers[0].std() > 0.5
    with pytest.raises(ValueError, match="has only 1"):
        adapter.compute_gae_advantage_return(rewards, rewards, torch.tensor([[0, 1, 0]]), 0.9, 0.8)


def test_grpo_by_hand():
    """Groups x: 1 and 3, y: 5 alone, z: three times 0.1, whose mean is not 0.1 in float32."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, 5.0], [1.0, 2.0], [0.1, 0.0], [0.1, 0.0], [0.1, 0.0]])
    mask = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [1, 1], [1, 1]])
    index = ["x", "y", "x", "z", "z", "z"]
    scaled, _ = adapter.compute_grpo_outcome_advantage(rewards, mask, index, epsilon=0.5)
    unit = 1.0 / (2**0.5 + 0.5)
    expected = torch.tensor([-unit, 5.0 / 1.5, unit, 0.0, 0.0, 0.0])[:, None] * mask
    assert torch.allclose(scaled, expected) and (scaled[3:] == 0).all()
    centred, _ = adapter.compute_grpo_outcome_advantage(rewards, mask, index, norm_adv_by_std_in_grpo=False)
    assert torch.allclose(centred, torch.tensor([-1.0, 5.0, 1.0, 0.0, 0.0, 0.0])[:, None] * mask, atol=1e-7)
    numbers, _ = adapter.compute_grpo_outcome_advantage(rewards, mask, torch.tensor([4, -2, 4, 9, 9, 9]), epsilon=0.5)
    assert torch.equal(numbers, scaled)
    with pytest.raises(ValueError, match="each of the 6 responses, got 2"):
        adapter.compute_grpo_outcome_advantage(rewards, mask, ["x", "y"])


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_linear_cross_entropy_by_definition(reduction):
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 3, 8, requires_grad=True), torch.randn(13, 8, requires_grad=True)
    labels = torch.randint(0, 13, (2, 3), dtype=torch.int32)
    logp = torch.log_softmax(hidden.reshape(6, 8) @ weight.T / 0.6, -1)
    picked = logp.gather(1, labels.reshape(6, 1).long())[:, 0]
    entropy = -(logp.exp() * logp).sum(-1)
    expected = {"none": picked, "sum": picked.sum(), "mean": picked.mean()}[reduction]
    logprobs, entropies = adapter.linear_cross_entropy(hidden, weight, labels, torch.tensor([0.6]), reduction)
    assert torch.allclose(logprobs, expected, atol=1e-5) and torch.allclose(entropies, entropy, atol=1e-5)
    reference = torch.autograd.grad(expected.sum() + entropy.sum(), (hidden, weight))
    for mine, theirs in zip(
        torch.autograd.grad(logprobs.sum() + entropies.sum(), (hidden, weight)), reference, strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_autocast_takes_a_float32_head():
    """verl's actor runs inside it: bfloat16 hidden states over weights that may be float32."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8).bfloat16().requires_grad_(), torch.randn(13, 8, requires_grad=True)
    labels = torch.randint(0, 13, (6,))
    with torch.autocast("cpu", torch.bfloat16):
        found = adapter.FusedLinearForPPO()(hidden, weight, labels)
    expected = adapter.FusedLinearForPPO()(hidden, weight.bfloat16(), labels)
    assert all(map(torch.equal, found, expected))
    assert [g.dtype for g in torch.autograd.grad(found[0].sum(), (hidden, weight))] == [torch.bfloat16, torch.float32]


def test_what_is_not_supported_says_so(monkeypatch):
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match="reduction must be none, sum or mean, got 'max'"):
        adapter.linear_cross_entropy(hidden, weight, labels, reduction="max")
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    with pytest.raises(ValueError, match="split over 4 ranks"):
        adapter.linear_cross_entropy(hidden, weight, labels, dist_process_group=object())
    with pytest.raises(ValueError, match="impl_backend must be torch or liger, got 'triton'"):
        adapter.FusedLinearForPPO(impl_backend="triton")
    with pytest.raises(ValueError, match=r"input_ids must have shape \[3\]"):
        adapter.FusedLinearForPPO()(hidden, weight, labels[:2])


def test_patch_without_verl_says_so():
    with pytest.raises(RuntimeError, match="verl is not installed"):
        adapter.patch()

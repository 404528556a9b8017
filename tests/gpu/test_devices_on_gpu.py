"""Tensors on a GPU that is not the current one: the kernels go where the tensors are."""

import pytest
import torch
from airl_kernels import discounted_returns, discriminator_loss, linear_ppo_loss, selective_log_softmax
from airl_kernels.testing import make_vocabulary_head, normal, offsets
from torch.autograd import grad

from tests.gpu.device import ON_GPU

pytestmark = pytest.mark.skipif(
    not ON_GPU or torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs that torch can use"
)


def results(device: str) -> list[torch.Tensor]:
    rewards = normal(400, 0, device)
    head = make_vocabulary_head(40, 64, 5000, dtype=torch.bfloat16, device=device)
    hidden, weight = head.leaves()
    per_token = rewards[:40].contiguous()
    policy, _ = linear_ppo_loss(hidden, weight, head.targets, per_token - 9.0, per_token)
    certain, logits = discriminator_loss(hidden, weight[0], None, per_token.gt(0).float(), per_token.abs())
    found = [discounted_returns(rewards, 0.9, offsets([100, 300], device)), policy, certain, logits]
    found += [*grad(policy, (hidden, weight)), *grad(certain, (hidden, weight))]
    scores = hidden.detach().float() @ weight.detach().float().T
    return [*found, selective_log_softmax(scores, head.targets)]


def test_tensors_beside_the_current_device():
    with torch.cuda.device(0):
        here, there = results("cuda:0"), results("cuda:1")
        assert torch.cuda.current_device() == 0
    for a, b in zip(here, there, strict=True):
        assert b.device.index == 1
        torch.testing.assert_close(b.cpu(), a.cpu())


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="got tensors on cuda:0 and cuda:1; move all of them to one device"):
        discounted_returns(torch.ones(4, device="cuda:0"), 0.9, offsets([4], "cuda:1"))

"""The shared optimiser: AdamW by hand, the schedule's rates, the clip, and steps that are skipped."""

import copy
import math

import pytest
import torch

from airl_fast.config import OptimConfig
from airl_fast.optim import Optimiser, make_optimiser


def parameters():
    torch.manual_seed(1)
    return torch.nn.Parameter(torch.randn(2, 3)), torch.nn.Parameter(torch.randn(3))


def give(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def rates(updates, steps=None, **config):
    """The learning rate each update is made with, as multiples of the configured one."""
    (matrix, vector), found = parameters(), []
    optimiser = make_optimiser([([matrix, vector], 1.0)], OptimConfig(learning_rate=2.0, **config), updates)
    for _ in range(steps or updates):
        found.append(optimiser.optimizer.param_groups[0]["lr"] / 2.0)
        give([matrix, vector], 0)
        optimiser.step()
    return found


def test_two_steps_of_adamw_by_hand():
    matrix, vector = parameters()
    config = OptimConfig(
        learning_rate=0.1,
        schedule="constant",
        warmup_fraction=0.0,
        betas=(0.8, 0.9),
        weight_decay=0.5,
        max_grad_norm=1e9,
    )
    optimiser = make_optimiser([([matrix], 1.0), ([vector], 3.0)], config, 10)
    expected = [matrix.detach().clone(), vector.detach().clone()]
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in expected]
    for step in (1, 2):
        give([matrix, vector], step)
        gradients = [matrix.grad.clone(), vector.grad.clone()]
        norm = optimiser.step()
        assert norm.item() == pytest.approx(math.sqrt(sum(g.square().sum().item() for g in gradients)), rel=1e-6)
        assert matrix.grad is None and vector.grad is None
        for i, (lr, decay) in enumerate(((0.1, 0.5), (0.3, 0.0))):  # a vector's rate is scaled, and it does not decay
            first, second = moments[i]
            first.mul_(0.8).add_(0.2 * gradients[i])
            second.mul_(0.9).add_(0.1 * gradients[i] ** 2)
            expected[i] *= 1 - lr * decay
            expected[i] -= lr * (first / (1 - 0.8**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
    torch.testing.assert_close(matrix.detach(), expected[0])
    torch.testing.assert_close(vector.detach(), expected[1])


def test_schedules():
    warm = [0.0, 0.5]  # from zero: two updates of warm-up in ten
    cosine = rates(10, schedule="cosine", warmup_fraction=0.2)
    assert cosine == pytest.approx(warm + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)])
    assert rates(10, schedule="linear", warmup_fraction=0.2) == pytest.approx(warm + [1 - i / 8 for i in range(8)])
    assert rates(10, schedule="constant", warmup_fraction=0.2) == pytest.approx([*warm, *[1.0] * 8])
    assert rates(4, schedule="constant", warmup_fraction=0.0) == [1.0] * 4
    assert rates(1, schedule="cosine", warmup_fraction=0.1) == [1.0]


def test_the_clip_scales_all_gradients_together():
    matrix, vector = parameters()
    before = [matrix.detach().clone(), vector.detach().clone()]
    descent = torch.optim.SGD([matrix, vector], lr=1.0)  # its step shows the gradient itself
    schedule = torch.optim.lr_scheduler.ConstantLR(descent, 1.0)
    optimiser = Optimiser(optimizer=descent, scheduler=schedule, parameters=(matrix, vector), max_grad_norm=0.5)
    give([matrix, vector], 3)
    gradients = [matrix.grad.clone(), vector.grad.clone()]
    norm = optimiser.step()
    assert norm > 1
    for parameter, old, gradient in zip((matrix, vector), before, gradients, strict=True):
        torch.testing.assert_close(old - parameter.detach(), gradient * 0.5 / norm, atol=1e-6, rtol=1e-5)
    middle = [matrix.detach().clone(), vector.detach().clone()]
    matrix.grad, vector.grad = torch.full((2, 3), 1e-2), torch.zeros(3)
    assert optimiser.step().item() == pytest.approx(1e-2 * math.sqrt(6))
    torch.testing.assert_close(middle[0] - matrix.detach(), torch.full((2, 3), 1e-2), atol=1e-6, rtol=0)  # untouched


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_gradient_that_is_not_finite_leaves_weights_and_moments(value):
    """Only the schedule moves on: whether the step was taken is known to the device alone."""
    config = OptimConfig(learning_rate=0.1, schedule="constant", warmup_fraction=0.0)
    runs = []
    for bad in (False, True):
        both = parameters()
        optimiser = make_optimiser([(both, 1.0)], config, 8)
        for seed in range(6):
            if bad and seed == 3:
                give(both, 99)
                both[1].grad[1] = value
                before, state = [p.detach().clone() for p in both], copy.deepcopy(optimiser.state_dict())
                assert not optimiser.step().isfinite()
                assert all(map(torch.equal, both, before))
                moments = [s["optimizer"]["state"] for s in (optimiser.state_dict(), state)]
                assert str(moments[0]) == str(moments[1])
                assert both[0].grad is None
            give(both, seed)
            optimiser.step()
        runs.append([p.detach().clone() for p in both])
    assert all(map(torch.equal, *runs))


def test_parameters_without_a_gradient_stay():
    matrix, vector = parameters()
    before = vector.detach().clone()
    optimiser = make_optimiser([([matrix, vector], 1.0)], OptimConfig(learning_rate=0.1, warmup_fraction=0.0), 10)
    matrix.grad = torch.ones(2, 3)
    assert optimiser.step().item() == pytest.approx(math.sqrt(6))
    assert torch.equal(vector, before)
    assert optimiser.step().item() == 0  # none at all


def test_saved_state_continues_bit_for_bit():
    config = OptimConfig(learning_rate=0.1, warmup_fraction=0.25)
    both, resumed = parameters(), parameters()
    first = make_optimiser([(both, 1.0)], config, 8)
    for seed in range(4):
        give(both, seed)
        first.step()
    second = make_optimiser([(resumed, 1.0)], config, 8)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    with torch.no_grad():
        for mine, theirs in zip(resumed, both, strict=True):
            mine.copy_(theirs)
    for seed in range(4, 8):
        give(both, seed), give(resumed, seed)
        first.step(), second.step()
    assert all(map(torch.equal, both, resumed))
    assert first.scheduler.get_last_lr() == second.scheduler.get_last_lr()

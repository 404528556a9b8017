"""Optimisers in few bits: 8-bit moments, float32 masters of bfloat16 weights, and resuming both."""

import math

import pytest
import torch

from airl_fast import checkpoint
from airl_fast.config import OptimConfig
from airl_fast.errors import UserError
from airl_fast.optim import make_optimiser

NAMES = ("adamw", "adamw_8bit", "paged_adamw_8bit")
SHAPES = ((96, 128), (16, 16), (64,))  # bitsandbytes keeps the moments of the first alone in 8 bits


def weights(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter((0.02 * torch.randn(shape, generator=generator)).to(dtype)) for shape in SHAPES]


def make(parameters, **changes):
    settings = {"learning_rate": 1e-5, "schedule": "constant", "warmup_fraction": 0.0, "max_grad_norm": 1e9}
    return make_optimiser([(parameters, 1.0)], OptimConfig(**(settings | changes)), 100)


def gradient(parameter, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + parameter.numel())
    return (torch.randn(parameter.shape, generator=generator) + 0.5).to(parameter.dtype)


def run(parameters, optimiser, steps) -> None:
    for step in steps:
        for parameter in parameters:
            parameter.grad = gradient(parameter, step)
        optimiser.step()


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_are_the_rounded_float32_ones(name):
    low, exact, steps = weights(torch.bfloat16), weights(torch.bfloat16), range(40)
    exact = [torch.nn.Parameter(parameter.detach().float()) for parameter in exact]
    run(low, make(low, name=name), steps)
    reference = make(exact, name=name)
    for step in steps:
        for parameter in exact:
            parameter.grad = gradient(parameter.bfloat16(), step).float()
        reference.step()
    for ours, theirs in zip(low, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours.detach(), theirs.detach().bfloat16())


def test_without_masters_most_bfloat16_weights_would_not_move():
    """Why there are masters: forty steps of lr 1e-5 move a weight by up to 4e-4."""
    start = weights(torch.bfloat16)[0].detach()
    plain, ours = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizer = torch.optim.AdamW([plain], lr=1e-5, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(40):
        plain.grad = gradient(plain, step)
        optimizer.step()
    run([ours], make([ours]), range(40))
    moved = [(parameter != start).float().mean().item() for parameter in (plain, ours)]
    assert moved[0] < 0.5 < 0.9 < moved[1]


def test_float32_weights_have_no_masters():
    assert make(weights()).masters == ()
    assert "masters" not in make(weights()).state_dict()
    mixed = [weights()[0], weights(torch.bfloat16)[1]]
    assert [weight is mixed[1] for weight, _ in make(mixed).masters] == [True]


@pytest.mark.parametrize("name", NAMES[1:])
def test_eight_bit_steps_follow_adamw(name):
    start, ours, exact = weights(), weights(), weights()
    eight = make(ours, name=name, learning_rate=1e-3)
    run(ours, eight, range(20))
    run(exact, make(exact, learning_rate=1e-3), range(20))
    moments = [eight.optimizer.state[parameter]["state1"].dtype for parameter in ours]
    assert moments == [torch.uint8, torch.float32, torch.float32]
    for parameter, other, before in zip(ours, exact, start, strict=True):
        step = (other - before).abs().mean()
        assert step > 5e-3
        error = (parameter - other).abs().mean() / step
        assert error < (0.05 if parameter.numel() >= 4096 else 1e-4)
    assert not torch.equal(ours[0], exact[0])  # it is not AdamW under another name


def test_what_runs_is_described():
    assert make(weights()).description == "AdamW"
    assert make(weights(torch.bfloat16)).description == "AdamW, float32 masters"
    assert make(weights(), name="adamw_8bit").description == "8-bit AdamW"
    assert make(weights(), name="paged_adamw_8bit").description == "8-bit AdamW (paged on a GPU only)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_optimiser_continues_bit_for_bit(tmp_path, name, dtype):
    changes = {"name": name, "schedule": "cosine", "warmup_fraction": 0.1, "learning_rate": 1e-4}
    whole = weights(dtype)
    run(whole, make(whole, **changes), range(8))
    first = weights(dtype)
    optimiser = make(first, **changes)
    run(first, optimiser, range(5))
    state = {"weights": [p.detach() for p in first], "optimiser": optimiser.state_dict()}
    checkpoint.save_tree(state, tmp_path / "state")
    loaded = checkpoint.load_tree(tmp_path / "state")
    second = weights(dtype)
    continued = make(second, **changes)
    with torch.no_grad():
        for parameter, saved in zip(second, loaded["weights"], strict=True):
            parameter.copy_(saved)
    continued.load_state_dict(loaded["optimiser"])
    run(second, continued, range(5, 8))
    for ours, theirs in zip(second, whole, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(continued.parameters, optimiser.parameters, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_of_a_bfloat16_weight_changes_nothing(value):
    parameters = weights(torch.bfloat16)
    optimiser = make(parameters, learning_rate=0.1)
    run(parameters, optimiser, range(2))
    before = [p.detach().clone() for p in (*parameters, *optimiser.parameters)]
    for parameter in parameters:
        parameter.grad = gradient(parameter, 3)
    parameters[1].grad[0, 0] = value
    assert not torch.isfinite(optimiser.step())
    assert all(torch.equal(p, old) for p, old in zip((*parameters, *optimiser.parameters), before, strict=True))
    assert all(p.grad is None for p in (*parameters, *optimiser.parameters))


def test_the_norm_and_the_clip_are_those_of_the_float32_gradients():
    parameters = weights(torch.bfloat16)
    optimiser = make(parameters)
    for parameter in parameters:
        parameter.grad = gradient(parameter, 0)
    expected = math.sqrt(sum(p.grad.double().square().sum().item() for p in parameters))
    assert optimiser.step().item() == pytest.approx(expected, rel=1e-5)  # bfloat16 sums would be off by 1e-3


def test_cleared_gradients_are_gone_from_weights_and_masters():
    parameters = weights(torch.bfloat16)
    optimiser = make(parameters)
    for parameter in (*parameters, *optimiser.parameters):
        parameter.grad = torch.ones_like(parameter)
    optimiser.clear()
    assert all(p.grad is None for p in (*parameters, *optimiser.parameters))


def test_frozen_parameters_are_left_out():
    parameters = weights()
    parameters[0].requires_grad_(False)
    assert [p is q for p, q in zip(make(parameters).parameters, parameters[1:], strict=True)] == [True, True]
    for parameter in parameters:
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match=r"no weight to train; check model\.lora and discriminator\.lora"):
        make(parameters)

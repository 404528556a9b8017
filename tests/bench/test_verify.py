"""Verification: what a benchmark must not let through, and what it must not mind."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import ops, peers
from bench.cases import CASES, Result
from bench.inputs import make_inputs
from bench.shapes import load_shapes, parse_shape
from bench.verify import Yardstick
from tests.product_orders import ORDERS, products_in_order

CPU = torch.device("cpu")
TINY = "linear:300x8x50,head:300x16x20,sequences:4x12,sequences:1x40,logits:40x30"


def wrong_backend(change) -> SimpleNamespace:
    """Ours, with its result changed; named as ours, so that the command must fail."""

    def prepare(case, shape):
        right = peers.airl.prepare(case, shape)
        return lambda inputs: change(right(inputs))

    return SimpleNamespace(NAME="airl", version=lambda: None, unavailable=lambda device: None, prepare=prepare)


def scaled(result: Result, factor: float) -> Result:
    return replace(result, gradients=tuple(g * factor for g in result.gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op} {c.mode}")
def test_verification_passes_ours_and_catches_two_percent(case, dtype):
    shape = next(shape for shape in load_shapes(TINY) if case.runs_at(shape))
    yardstick = Yardstick(case, shape, dtype, CPU)
    run = peers.airl.prepare(case, shape)
    inputs = [make_inputs(case, shape, dtype, CPU) for _ in range(3)]
    assert yardstick.check(run, inputs[0], ours=True).passed

    def off(inputs):
        right = run(inputs)
        parts = right.gradients or right.outputs
        changed = (parts[0] * 1.02, *parts[1:])
        return replace(right, **{"gradients" if right.gradients else "outputs": changed})

    assert not yardstick.check(off, inputs[1], ours=True).passed


FAULTS = {
    "half a percent": lambda t: t * 1.005,
    "a lost row": lambda t: t.index_fill(0, t.abs().reshape(len(t), -1).sum(1).argmax(), 0.0),  # one that is not masked
    "a sign": lambda t: -t,
    "bfloat16": lambda t: t.bfloat16().to(t.dtype),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.family in ("linear", "logits")], ids=lambda c: f"{c.op} {c.mode}"
)
def test_verification_catches_what_no_order_of_adding_explains(case, fault):
    shape = next(shape for shape in load_shapes(TINY) if case.runs_at(shape))
    yardstick, run = Yardstick(case, shape, torch.float32, CPU), peers.airl.prepare(case, shape)

    def wrong(inputs):
        right = run(inputs)
        parts = right.gradients or right.outputs
        changed = (*parts[:-1], FAULTS[fault](parts[-1]))
        return replace(right, **{"gradients" if right.gradients else "outputs": changed})

    assert not yardstick.check(wrong, make_inputs(case, shape, torch.float32, CPU), ours=True).passed


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", [c for c in CASES if c.family == "linear"], ids=lambda c: f"{c.op} {c.mode}")
def test_verification_says_the_same_under_every_order_of_a_product(case, order):
    shape = parse_shape("linear:3x16x9001")  # few rows, many terms
    expected = Yardstick(case, shape, torch.float32, CPU)
    with products_in_order(order):
        yardstick, run = Yardstick(case, shape, torch.float32, CPU), peers.airl.prepare(case, shape)
        check = yardstick.check(run, make_inputs(case, shape, torch.float32, CPU), ours=True)
    assert check.passed, check
    again = expected.check(peers.airl.prepare(case, shape), make_inputs(case, shape, torch.float32, CPU), ours=True)
    assert again.passed, again


def test_verification_catches_a_missing_group_member():
    case, shape = next(c for c in CASES if c.op == "group_advantages"), parse_shape("sequences:4x12")
    yardstick, run = Yardstick(case, shape, torch.float32, CPU), peers.airl.prepare(case, shape)
    inputs = make_inputs(case, shape, torch.float32, CPU)

    def without_the_last(inputs):
        group = inputs.group.clone()
        group[-1] += 1
        return run(replace(inputs, group=group))

    assert yardstick.check(run, inputs, ours=True).passed
    assert not yardstick.check(without_the_last, inputs, ours=True).passed


def test_verification_catches_nan_and_missing_gradients():
    case, shape = next(c for c in CASES if c.op == "gae"), parse_shape("sequences:4x12")
    yardstick, run = Yardstick(case, shape, torch.float32, CPU), peers.airl.prepare(case, shape)
    inputs = make_inputs(case, shape, torch.float32, CPU)

    def with_nan(inputs):
        first, second = run(inputs).outputs
        return Result(outputs=(first, second * torch.nan), gradients=())

    assert yardstick.check(run, inputs, ours=True).passed
    assert yardstick.check(with_nan, inputs, ours=True).what == "output 1"
    assert not yardstick.check(with_nan, inputs, ours=True).passed
    assert not yardstick.check(lambda i: Result(outputs=(), gradients=()), inputs, ours=True).passed


def test_an_error_in_the_last_rows_at_full_size_is_seen():
    """Such as an offset that overflows: the problem of 256 tokens is right, the whole is not."""
    (case,) = (c for c in CASES if (c.op, c.mode) == ("linear_logprob", "frozen f+b"))
    shape = parse_shape("linear:400x8x50")
    right = peers.airl.prepare(case, shape)

    def run(inputs):
        result = right(inputs)
        if result.outputs[0].numel() == 400:
            result.gradients[0][399] = 0.0
        return result

    check = Yardstick(case, shape, torch.float32, CPU).check(
        run, make_inputs(case, shape, torch.float32, CPU), ours=True
    )
    assert not check.passed
    assert check.what == "sampled rows of gradient 0"


def test_a_wrong_backend_is_reported_not_timed_and_fails_the_command(monkeypatch, capsys):
    wrong = wrong_backend(lambda result: scaled(result, 1.05))
    monkeypatch.setattr(ops, "BACKENDS", (wrong, peers.torch_eager))
    assert ops.main(["--shapes", "linear:40x8x50", "--ops", "linear_ppo_loss", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "failed: airl: wrong: gradient 0 is off by 0.05 of its size" in printed
    assert "torch eager" in printed.split("failed:")[0]

"""Problems of `bench.ops` that need care: heads sliced out of a padded weight, peers that compile, one without room."""

from types import SimpleNamespace

import pytest
import torch

from bench import ops, peers
from bench.cases import CASES
from bench.inputs import make_inputs
from bench.shapes import parse_shape
from bench.verify import Yardstick

CPU = torch.device("cpu")


def test_what_compiles_for_a_shape_is_verified_at_full_size_alone(monkeypatch):
    seen = []

    def prepare(case, shape):
        run = peers.airl.prepare(case, shape)
        return lambda inputs: seen.append(inputs.hidden.shape[0]) or run(inputs)

    slow = SimpleNamespace(
        NAME="slow", version=lambda: None, unavailable=lambda device: None, prepare=prepare, COMPILES_FOR_A_SHAPE=True
    )
    monkeypatch.setattr(ops, "BACKENDS", (peers.airl, slow))
    for tokens in (300, 40):  # beyond and below the problem that is compared whole
        document = ops.measure_ops(shapes=f"head:{tokens}x8x9", ops="token_rewards", device="cpu", seconds=0.01)
        assert {row.backend for row in document.rows} == {"airl", "slow"} and set(seen) == {tokens}
        seen.clear()


def test_a_problem_that_cannot_be_set_up_is_reported_and_the_next_one_runs(monkeypatch):
    from bench import measure

    make = measure.make_inputs

    def fails(case, shape, *rest):
        if shape.name == "logits:8x30":
            raise torch.OutOfMemoryError("no room")
        return make(case, shape, *rest)

    monkeypatch.setattr(measure, "make_inputs", fails)
    options = {"ops": "selective_log_softmax", "backends": "airl", "device": "cpu", "seconds": 0.01}
    document = ops.measure_ops(shapes="logits:8x30,logits:9x30", **options)
    assert {row.shape for row in document.rows} == {"logits:9x30"}
    assert {entry.reason for entry in document.of_kind("failed")} == {"OutOfMemoryError: no room"}
    assert ops.exit_code(document) == 1


# ---- a head sliced out of a padded weight --------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.family == "linear"], ids=lambda c: f"{c.op} {c.mode}")
def test_a_padded_head_gives_the_same_and_no_gradient_past_its_rows(case):
    shape = parse_shape("linear:40x8x47of50")
    assert (shape.name, shape.size("vocabulary"), shape.padded) == ("linear:40x8x47of50", 47, 50)
    assert shape.with_tokens(7).name == "linear:7x8x47of50"
    inputs = make_inputs(case, shape, torch.float32, CPU)
    assert inputs.weight.shape == (50, 8) and inputs.head.shape == (47, 8)
    padded, cut = (peers.airl.prepare(case, shape)(i) for i in (inputs, inputs.mapped(lambda w: w[:47], ("weight",))))
    for a, b in zip(padded.outputs, cut.outputs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(padded.gradients, cut.gradients, strict=True):
        torch.testing.assert_close(a[: len(b)], b)
        assert a.shape[0] in (40, 50) and not a[len(b) :].any()
    assert Yardstick(case, shape, torch.float32, CPU).check(peers.airl.prepare(case, shape), inputs, ours=True).passed

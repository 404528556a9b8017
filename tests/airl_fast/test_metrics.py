"""Metrics: exact values, one transfer, one valid JSON line a step."""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from airl_fast.errors import UserError
from airl_fast.metrics import Metrics, fetch, peak_rss_gib, read_metrics


@dataclass(frozen=True, slots=True)
class Inner:
    gap: torch.Tensor
    skipped: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Stats:
    loss: torch.Tensor
    rows: torch.Tensor
    ok: torch.Tensor
    lr: float
    inner: Inner


class Pair(NamedTuple):
    a: int
    b: torch.Tensor


def stats(loss: float = 0.1) -> Stats:
    return Stats(
        loss=torch.tensor(loss, requires_grad=True) * 1,
        rows=torch.tensor(2**40 + 1),
        ok=torch.tensor(True),
        lr=1e-5,
        inner=Inner(gap=torch.tensor([2.5], dtype=torch.bfloat16)),
    )


def test_fetch_gives_exact_numbers_in_order() -> None:
    values = fetch(stats(), {"x": 3}, d=Pair(a=True, b=torch.tensor(-1.0)), alone=torch.tensor(4))
    assert list(values.items()) == [
        ("loss", float(torch.tensor(0.1))),  # the float32, not 0.1
        ("rows", 2**40 + 1),
        ("ok", 1),
        ("lr", 1e-5),
        ("inner/gap", 2.5),
        ("x", 3),
        ("d/a", 1),
        ("d/b", -1.0),
        ("alone", 4),
    ]
    assert type(values["rows"]) is int and type(values["loss"]) is float


class CountReads(TorchDispatchMode):
    """Counts reads of single values, which is what `.item()` and `float(t)` do."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return func(*args, **(kwargs or {}))


def test_fetch_reads_no_value_singly() -> None:
    with CountReads() as counter:
        fetch(stats(), more={str(i): torch.tensor(i) for i in range(20)})
        assert counter.reads == 0
        torch.ones(1).item()
    assert counter.reads == 1  # the counter does count


@pytest.mark.parametrize("record", [{"x": torch.ones(2)}, {"x": "text"}, {"x": [1]}, 3.0, torch.tensor(1.0)])
def test_fetch_refuses_what_is_not_one_named_number(record: object) -> None:
    with pytest.raises(TypeError, match="not one number"):
        fetch(record)


def test_a_name_given_twice_is_refused_and_a_prefix_separates() -> None:
    with pytest.raises(ValueError, match="'loss' is given twice"):
        fetch({"loss": 1.0}, {"loss": 2.0})
    assert fetch({"loss": 1.0}, d={"loss": 2.0}) == {"loss": 1.0, "d/loss": 2.0}


def test_one_line_a_step_with_time_speed_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Metrics(path, total_steps=10) as metrics:
        with metrics.phase("sample"):
            time.sleep(0.05)
        with metrics.phase("sample"):
            time.sleep(0.05)
        with metrics.phase("update"):
            pass
        first = metrics.log(1, {"loss": 1.5}, tokens=1000)
        second = metrics.log(2, {"loss": 0.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and [line["loss"] for line in lines] == [1.5, 0.5]
    assert lines[0] == {"step": 1, **first} and read_metrics(path) == lines
    assert 0.1 <= first["seconds/sample"] <= first["seconds/step"] < 2 and first["seconds/update"] < 0.05
    assert first["tokens_per_s"] == pytest.approx(1000 / first["seconds/step"])
    assert first["eta_s"] == pytest.approx(9 * first["seconds/step"])
    mean = (first["seconds/step"] + second["seconds/step"]) / 2
    assert second["eta_s"] == pytest.approx(8 * mean)
    assert "seconds/sample" not in second and "tokens_per_s" not in second
    assert 0.05 < first["peak_rss_gib"] < 64


def test_a_phase_counts_even_when_it_fails(tmp_path: Path) -> None:
    with Metrics(tmp_path / "m", total_steps=1) as metrics:
        with pytest.raises(RuntimeError), metrics.phase("sample"):
            raise RuntimeError
        assert "seconds/sample" in metrics.log(1, {})


def test_values_that_are_not_finite_are_null(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with Metrics(path, total_steps=1, logs=tmp_path / "logs") as metrics:
        values = metrics.log(1, {"a": torch.tensor(math.nan), "b": math.inf, "c": 1.0})
    assert math.isnan(values["a"]) and values["b"] == math.inf
    line = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (line["a"], line["b"], line["c"]) == (None, None, 1.0)


def test_appends_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    for step in (1, 2):
        with Metrics(path, total_steps=2, start_step=step - 1) as metrics:
            metrics.log(step, {})
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert len(read_metrics(path)) == 2


def test_tensorboard_holds_the_same_values_and_forgets_repeated_steps(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, values in ((0, {1: 1.0, 2: 2.0, 3: 3.0}), (1, {2: 20.0, 3: 30.0})):
        with Metrics(tmp_path / "m", total_steps=3, start_step=start, logs=tmp_path / "logs") as metrics:
            for step, value in values.items():
                metrics.log(step, policy={"loss": value})
            metrics.flush()
        time.sleep(1.1)  # the names of TensorBoard's files count seconds
    board = EventAccumulator(str(tmp_path / "logs"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("policy/loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_wandb_is_asked_for_in_one_sentence_when_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail, installed or not
    with pytest.raises(UserError, match="wandb=true, but wandb is not installed; pip install wandb"):
        Metrics(tmp_path / "m", total_steps=1, wandb=True)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_one_sentence() -> None:
    sentence = "/dev/full: cannot be written: No space left on device; free some space"
    with pytest.raises(UserError, match=sentence), Metrics(Path("/dev/full"), total_steps=1) as metrics:
        metrics.log(1, {})


def test_peak_memory_covers_what_the_process_holds_now() -> None:
    block = torch.ones(2**25)  # 128 MiB, so that a unit mistake cannot pass
    now = psutil.Process().memory_info().rss / 2**30
    assert block.sum() == 2**25 and 0.125 < now <= peak_rss_gib() * 1.01 < 64

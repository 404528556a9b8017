"""The predictions against hand calculation, and the table of compiled kernels."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import resources, roofline

ROOT = Path(__file__).parents[2]
COMPILED = os.environ.get("TRITON_INTERPRET") != "1"


def predictions(shape: str, op: str, mode: str) -> dict[str, roofline.Prediction]:
    return {p.chip: p for p in roofline.predict(shape, [op], list(roofline.CHIPS)) if p.mode == mode}


def test_a_linear_op_takes_its_products_and_the_row_kernels_traffic():
    found = predictions("linear:4096x3584x152064", "linear_ppo_loss", "frozen f+b")
    operations = 2 * 2 * 4096 * 3584 * 152064  # two products
    traffic = 6 * 4096 * 152064  # bytes, bf16 logits read twice and written once
    for chip, tflops, bandwidth in (("A100-80GB SXM", 312, 2039), ("H200 SXM", 989.5, 4800)):
        floor = operations / (tflops * 1e12) * 1e3
        assert found[chip].floor_ms == pytest.approx(floor)
        assert found[chip].predicted_ms == pytest.approx(floor + traffic / (bandwidth * 1e9) * 1e3)
        assert found[chip].percent_of_floor == pytest.approx(100 * floor / found[chip].predicted_ms)
        assert found[chip].bound == "gemm"
    trained = predictions("linear:4096x3584x152064", "linear_ppo_loss", "trainable f+b")["H100 SXM"]
    rounding = 6 * 3584 * 152064  # the fp32 gradient of the weight read, its bf16 written
    floor = 1.5 * operations / 989.5e12 * 1e3
    assert trained.predicted_ms == pytest.approx(floor + (traffic + rounding) / 3350e9 * 1e3)


def test_an_op_without_products_takes_its_bytes():
    found = predictions("head:32768x896x151936", "discriminator_loss", "f+b")["H200 SXM"]
    assert found.floor_ms == found.predicted_ms == pytest.approx(4 * 32768 * 896 / 4800e9 * 1e3)
    returns = predictions("sequences:1024x8192", "discounted_returns", "forward")["A100-80GB SXM"]
    assert returns.floor_ms == pytest.approx(9 * 1024 * 8192 / 2039e9 * 1e3)


def test_predictions_are_labelled_as_such(tmp_path, capsys):
    path = tmp_path / "roofline.json"
    assert roofline.main(["--shapes", "logits:4096x151936", "--chips", "H200", "--json", str(path)]) == 0
    assert capsys.readouterr().out.startswith("PREDICTION FROM DATASHEET RATES, NOT A MEASUREMENT.")
    value = json.loads(path.read_text())
    assert value["label"] == "prediction from datasheet rates, not a measurement"
    assert {row["label"] for row in value["rows"]} == {value["label"]}
    assert [chip["name"] for chip in value["chips"]] == ["H200 SXM"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--chips", "V100"], "--chips V100: give some of A100, H100, H200."),
        (["--ops", "nope"], "--ops nope: give some of linear_logprob"),
        (["--shapes", "nope"], "--shapes nope: give cpu, gpu"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_arguments_of_the_roofline(arguments, sentence, capsys):
    assert roofline.main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"bench.roofline: {sentence}")


@pytest.mark.skipif(not COMPILED, reason="the interpreter compiles nothing")
def test_resources_prints_every_chip_side_by_side(capsys):
    pytest.importorskip("triton")
    assert resources.main(["--family", "returns", "--only", "gae", "--arch", "80", "90"]) == 0
    header, _, *lines = capsys.readouterr().out.splitlines()[2:]
    assert [cell.strip() for cell in header.strip("|").split("|")][3:] == [
        *("sm_80 registers", "spills B", "shared KB", "occupancy"),
        *("sm_90 registers", "spills B", "shared KB", "occupancy"),
    ]
    assert lines
    for line in lines:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert 16 <= int(cells[3]) <= 255
        assert cells[4] == cells[8] == "0"
        assert 0 < int(cells[6].rstrip("%")) <= 100


@pytest.mark.skipif(not COMPILED, reason="the interpreter compiles nothing")
def test_resources_without_a_launch_of_that_name(capsys):
    pytest.importorskip("triton")
    assert resources.main(["--family", "returns", "--only", "nothing"]) == 2
    assert capsys.readouterr().err == "bench.resources: --only nothing: no launch has this in its name.\n"


def test_the_pytest_benchmarks_run_when_named_and_only_then():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench/test_ops_benchmark.py",
        "--benchmark-only",
        "-k",
        "gae and 272x300",
    ]
    # pytest-benchmark does nothing in a worker of pytest-xdist, and takes a child of one for a worker.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command += ["-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True, check=False)
    if "unrecognized arguments: --benchmark-only" in run.stderr:
        pytest.skip("pytest-benchmark is not installed")
    assert run.returncode == 0, run.stdout
    assert "1 passed" in run.stdout
    assert "test_op[gae-forward-sequences:" in run.stdout
    assert 'testpaths = ["tests"]' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")

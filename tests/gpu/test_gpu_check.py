"""`make gpu-check` without a GPU: its exit codes and summary, and the GPU's tests tried on the CPU."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from bench import gpu_check, targets
from bench.results import Row

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = dict.fromkeys(("device", "capability", "python", "torch", "cuda", "triton"), "1.2")
# Not to be found on a GPU machine: a stand-in for an environment of torch, triton, pytest and numpy alone.
BARE = """
import sys
for name in ("hypothesis", "transformers", "airl_fast", "xdist", "pytest_timeout", "pytest_benchmark", "trl", "peft",
             "liger_kernel", "cut_cross_entropy", "matplotlib"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
"""


def bare(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Run `code` as on a GPU machine: sources by PYTHONPATH, no plugins, nothing installed beside what is needed."""
    environment = {
        **os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        **variables,
    }  # fmt: skip
    command = [sys.executable, "-c", BARE + code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)


PYTEST = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("interpret", "chosen"),
    [
        ("0", ""),
        # The kernels themselves, once per family: numpy takes seconds for each.
        ("1", "careful_torch and (gae or last_token or compact or (action and odd and (logit or bce)) or 17)"),
        ("1", "infinit or masked or nothing"),
    ],
    ids=["C++ and torch", "interpreted", "interpreted, edges"],
)  # fmt: skip
def test_the_gpu_tests_pass_on_the_cpu_in_a_bare_environment(interpret, chosen, tmp_path):
    command = gpu_check.test_command(tmp_path)[3:]
    run = bare(PYTEST, *command, "-k", chosen, AIRL_GPU_TESTS_DEVICE="cpu", TRITON_INTERPRET=interpret)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    text, failed = gpu_check.test_summary(tmp_path / "tests.xml", gpu_check.Ran(code=0, seconds=1.0))
    assert not failed
    assert int(text.split(" passed")[0]) >= (200 if interpret == "0" else 7)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_they_are_skipped_with_a_reason(tmp_path):
    run = bare(PYTEST, *gpu_check.test_command(tmp_path)[3:])
    assert run.returncode == 0, run.stdout[-2000:]
    assert "needs an NVIDIA GPU that torch can use" in run.stdout
    # A check that tested nothing has not passed.
    assert gpu_check.test_summary(tmp_path / "tests.xml", gpu_check.Ran(code=0, seconds=1.0))[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_check_says_so(tmp_path):
    run = bare("from bench.gpu_check import main; sys.exit(main(sys.argv[1:]))", str(tmp_path / "out"))
    assert run.returncode == 2
    assert run.stderr.startswith("gpu-check: no NVIDIA GPU: ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(gpu_check.BadArgument, match="the package no_such_package is missing"):
        gpu_check.describe()


# ---- exit codes ------------------------------------------------------------------------------------------------

TEST_FILE = "def test_right():\n    assert True\n\n\ndef test_other():\n    assert {}\n"


def commands(monkeypatch, tmp_path: Path, tests: str, bench: list[str], updates: str = "print('no pydantic')") -> None:
    """A small test file and a small benchmark in place of the GPU's."""
    (tmp_path / "test_small.py").write_text(tests)
    report = f"--junitxml={tmp_path / 'out' / 'tests.xml'}"
    options = ["-c", os.devnull, "-p", "no:cacheprovider", report, str(tmp_path / "test_small.py")]
    monkeypatch.setattr(gpu_check, "test_command", lambda out: [sys.executable, "-m", "pytest", *options])
    monkeypatch.setattr(gpu_check, "bench_command", lambda out, budget: bench)
    monkeypatch.setattr(gpu_check, "updates_command", lambda out: [sys.executable, "-c", updates])
    (tmp_path / "out").mkdir()


def small_benchmark(tmp_path: Path) -> list[str]:
    shapes = "linear:32x16x300,sequences:4x16"
    options = ["--device", "cpu", "--shapes", shapes, "--backends", "airl,torch eager", "--budget-s", "20"]
    return [sys.executable, "-m", "bench.ops", *options, "--json", str(tmp_path / "out" / "ops.json")]


def test_a_failing_test_fails_the_check_and_the_benchmark_runs_all_the_same(monkeypatch, tmp_path, capsys):
    commands(monkeypatch, tmp_path, TEST_FILE.format("False"), small_benchmark(tmp_path))
    assert gpu_check.check(tmp_path / "out", ENVIRONMENT) == 1
    text = (tmp_path / "out" / "summary.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    assert "1 passed, 1 failed, 0 skipped" in text
    assert "- FAILED test_other: " in text
    assert "linear_logprob" in text
    assert "Not measured: discriminator_loss f+b (all shapes), target 80%." in text
    assert text.endswith("Check FAILED.\n")
    rows = json.loads((tmp_path / "out" / "ops.json").read_text())["rows"]
    assert {row["backend"] for row in rows} >= {"airl"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "bench.log", "ops.json", "summary.md", "tests.log", "tests.xml", "updates.log",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("bench", "code", "says"),
    [
        ("pass", 1, "bench.ops ended with code 0 and left no results"),
        ("import sys; sys.exit(3)", 1, "bench.ops ended with code 3 and left no results"),
        ("import time; print('begun', flush=True); time.sleep(60)", 1, "bench.ops stopped after"),
    ],
    ids=["no file", "broken", "too long"],
)
def test_a_benchmark_without_results_fails_the_check(bench, code, says, monkeypatch, tmp_path):
    commands(monkeypatch, tmp_path, TEST_FILE.format("True"), [sys.executable, "-c", bench])
    monkeypatch.setattr(gpu_check, "GRACE", 1.0)
    monkeypatch.setattr(gpu_check, "WHOLE", 0.0)
    monkeypatch.setattr(gpu_check, "LEAST_BENCH_SECONDS", 1.0)
    assert gpu_check.check(tmp_path / "out", ENVIRONMENT) == code
    text = (tmp_path / "out" / "summary.md").read_text()
    assert says in text
    assert "2 passed, 0 failed" in text


def test_tests_that_hang_are_stopped(monkeypatch, tmp_path):
    hangs = "import time\n\n\ndef test_hangs():\n    time.sleep(60)\n"
    commands(monkeypatch, tmp_path, hangs, [sys.executable, "-c", "pass"])
    monkeypatch.setattr(gpu_check, "TEST_SECONDS", 3.0)
    assert gpu_check.check(tmp_path / "out", ENVIRONMENT) == 1
    assert "Stopped after 3 s" in (tmp_path / "out" / "summary.md").read_text()
    assert "stopped after 3 s" in (tmp_path / "out" / "tests.log").read_text()


# ---- targets ---------------------------------------------------------------------------------------------------

NUMBERS = {field.name: {"str": "", "int": 1, str: "", int: 1}.get(field.type, 1.0) for field in fields(Row)}
ROW = Row(
    **{
        **NUMBERS, "op": "linear_logprob", "mode": "frozen f+b", "shape": "linear:4096x3584x152064", "backend": "airl",
        "percent_of_floor": 81.0, "ratio_to_peer": {"eager": 3.0, "liger": 1.2},
        "memory_ratio_to_peer": {"eager": 9.0, "liger": 1.0},
    }
)  # fmt: skip


def test_targets_reached_and_missed(tmp_path):
    rows = [
        replace(ROW, mode="no_grad", ratio_to_peer={}, memory_ratio_to_peer={}),
        ROW,
        replace(ROW, percent_of_floor=79.9, ratio_to_peer={"eager": 0.9}, memory_ratio_to_peer={"eager": 0.5}),
        replace(ROW, shape="linear:4096x896x151936", percent_of_floor=10.0),
        replace(ROW, backend="eager", percent_of_floor=1.0),
        replace(ROW, op="discounted_returns", mode="forward", shape="sequences:1024x8192", percent_of_floor=70.0),
        replace(ROW, op="discounted_returns", mode="forward", shape="sequences:272x300", percent_of_floor=1.0),
    ]
    verdicts = targets.judge(rows)
    assert [(v.percent, v.reached, v.faster, v.leaner) for v in verdicts] == [
        (80, True, True, True),
        (80, False, False, False),
        (70, True, True, True),
        (None, None, None, None),
        (None, None, True, True),
        (None, None, True, True),
    ]
    assert (verdicts[0].fastest_peer, verdicts[0].leanest_peer) == ("liger", "liger")
    assert [t.op for t in targets.missing(rows)] == ["linear_ppo_loss", "discriminator_loss", "selective_log_softmax"]
    document = {"floors": {"copy": 4.0}, "rows": [asdict(row) for row in rows], "absent": []}
    (tmp_path / "ops.json").write_text(json.dumps(document))
    text, failed = gpu_check.bench_summary(tmp_path / "ops.json", gpu_check.Ran(code=0, seconds=3.0))
    assert not failed  # a target missed fails nothing
    assert "2 of 3 rows with a target reach it; 4 of 5 are ahead of every peer" in text
    reached, missed = (line for line in text.splitlines() if "3584x152064" in line and "frozen" in line)
    assert reached.count("pass") == 3
    assert "1.20x liger" in reached
    assert missed.count("MISS") == 3


def test_an_op_that_answers_wrongly_fails_the_check(tmp_path):
    absent = {"kind": "failed", "op": "gae", "mode": "forward", "shape": "s", "backend": "airl", "reason": "error 1"}
    (tmp_path / "ops.json").write_text(json.dumps({"rows": [asdict(ROW)], "absent": [absent]}))
    text, failed = gpu_check.bench_summary(tmp_path / "ops.json", gpu_check.Ran(code=1, seconds=3.0))
    assert failed
    assert "FAILED airl gae forward s: error 1" in text


def test_every_target_is_measured_by_the_benchmark():
    """Names of ops, modes and shapes are those of the benchmark, so that no target is silently never judged."""
    from bench.cases import CASES
    from bench.shapes import load_shapes

    shapes = load_shapes("gpu")
    for target in targets.TARGETS:
        case = next(case for case in CASES if (case.op, case.mode) == (target.op, target.mode))
        assert any(case.runs_at(shape) and target.where(shape.sizes) for shape in shapes), target


UPDATES = """
import json, sys
row = {"policy": "p", "discriminator": "d", "variant": "shared", "backend": "flash", "rows": 5, "tokens_per_s": 7.0,
       "seconds": {"policy": 2.0}, "peak_mib": 3.0, "model_flops_utilisation": 0.5}
document = {"device": "X", "shape": {"prompts": 1}, "gemm_tflops": 700.0, "rows": [row]}
json.dump(document, open(%r, "w"))
"""


@pytest.mark.parametrize("measured", [True, False])
def test_updates_are_shown_and_fail_nothing(measured, monkeypatch, tmp_path):
    code = UPDATES % str(tmp_path / "out" / "updates.json") if measured else "raise SystemExit('pydantic is missing')"
    commands(monkeypatch, tmp_path, TEST_FILE.format("True"), small_benchmark(tmp_path), code)
    assert gpu_check.check(tmp_path / "out", ENVIRONMENT) == 0
    text = (tmp_path / "out" / "summary.md").read_text()
    assert ("GEMM 700 TFLOP/s" in text and "50 %" in text and "45 %" in text) == measured
    assert ("Not measured, bench.updates ended with code 1: pydantic is missing" in text) != measured

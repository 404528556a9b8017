"""`make gpu-check` without a GPU: the GPU's tests tried on the CPU, the stages' limits, a short rehearsal."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check
from bench.visit import summary
from bench.visit.plan import STAGES, WHOLE, Stage, Visit
from bench.visit.records import append, of, read
from bench.visit.stream import VARIABLE
from bench.visit.tests import TESTS, test_command

test_command.__test__ = False
ROOT = Path(__file__).resolve().parents[2]
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
    ("stage", "interpret", "chosen", "at_least"),
    [
        ("tests", "0", "", 190),
        ("compiled", "0", "", 10),
        # The kernels themselves, once per family: numpy takes seconds for each.
        ("tests", "1", "careful_torch and (gae or last_token or compact or (action and odd and (logit or bce)) or 17)",
         7),
        ("tests", "1", "infinit or masked or nothing", 7),
    ],
    ids=["C++ and torch", "compiled", "interpreted", "interpreted, edges"],
)  # fmt: skip
def test_the_gpu_tests_pass_on_the_cpu_in_a_bare_environment(stage, interpret, chosen, at_least, tmp_path):
    records = tmp_path / "results.jsonl"
    shard = {VARIABLE: f"{records}|{stage}|0|1", "AIRL_GPU_TESTS_DEVICE": "cpu", "TRITON_INTERPRET": interpret}
    run = bare(PYTEST, *test_command(stage, chosen, TESTS)[3:], **shard)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    cases = of(read(records), stage, "case")
    assert all(case["passed"] for case in cases)
    assert sum(not case["skipped"] for case in cases) >= at_least
    assert any("compiles" in case["name"] for case in cases) == (stage == "compiled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_they_are_skipped_and_a_check_that_tested_nothing_has_not_passed(tmp_path):
    records = tmp_path / "results.jsonl"
    run = bare(PYTEST, *test_command("tests", None, TESTS)[3:], **{VARIABLE: f"{records}|tests|0|1"})
    assert run.returncode == 0, run.stdout[-2000:]
    cases = of(read(records), "tests", "case")
    assert len(cases) > 300 and all(case["skipped"] for case in cases)
    assert any("needs an NVIDIA GPU that torch can use" in case["error"] for case in cases)
    append(records, "tests", "end", code=0, seconds=1.0)
    assert summary.exit_code(records) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_check_says_so(tmp_path):
    run = bare("from bench.gpu_check import main; sys.exit(main(sys.argv[1:]))", str(tmp_path / "out"))
    assert run.returncode == 2
    assert run.stderr.startswith("gpu-check: no NVIDIA GPU: ")
    assert run.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such_package"))
    with pytest.raises(gpu_check.BadArgument, match="the package no_such_package is missing"):
        gpu_check.describe(Visit(out=tmp_path))


def test_an_unknown_stage_and_a_folder_that_is_a_file(tmp_path, capsys):
    assert gpu_check.main([str(tmp_path), "--stages", "smok"]) == 2
    assert "--stages smok: give some of smoke, headline" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert gpu_check.main([str(tmp_path / "file"), "--rehearse", "--stages", "smoke"]) == 2
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-3", "nan", "inf", "soon"])
def test_seconds_that_are_none(seconds, tmp_path, capsys):
    assert gpu_check.main([str(tmp_path / "out"), "--rehearse", "--stages", "smoke", "--whole-s", seconds]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpu-check: ") and "--whole-s" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_takes_a_folder_with_a_space_in_its_name(tmp_path):
    command = ["make", "gpu-check", f"OUT={tmp_path / 'a b'}", "GPU_CHECK=--stages none", f"PYTHON={sys.executable}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "gpu-check: --stages none: give some of" in run.stderr


# ---- the stages' limits ------------------------------------------------------------------------------------------

CASE = "from pathlib import Path; from bench.visit.records import append; import sys, time, subprocess\n"


def stage(name: str, code: str, seconds: float = 60.0, **options: object) -> Stage:
    """A stage of a few lines; `note(name, passed)` records a case."""
    note = "note = lambda n, p: append(Path(sys.argv[1]), %r, 'case', name=n, passed=p, seconds=0.1, error='E: ' + n)\n"

    def command(visit: Visit, limit: float) -> list[str]:
        return [sys.executable, "-c", CASE + note % name + code, str(visit.records)]

    return Stage(name=name, seconds=seconds, toy_seconds=seconds, command=command, **options)


def visit_of(folder: Path) -> Visit:
    (folder / "out").mkdir()
    return Visit(out=folder / "out", rehearse=True)


def test_a_stage_that_fails_or_overruns_leaves_what_it_has_and_the_next_runs(tmp_path, capsys):
    visit = visit_of(tmp_path)
    late = repr(str(tmp_path / "grandchild"))
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({late}).write_text('alive')"
    stages = (
        stage("one", "note('a', True); raise SystemExit(3)"),
        stage("two", f"note('b', True); subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)", 3.0),
        stage("three", "note('c', False)"),
        stage("four", "note('d', True)", module="no_such_module"),
    )
    start = time.monotonic()
    assert gpu_check.check(visit, stages, 100.0) == 1
    assert time.monotonic() - start < 40
    records = read(visit.records)
    assert [r["name"] for r in of(records, kind="case")] == ["a", "b", "c"]
    ends = {r["stage"]: r.get("code", r.get("skipped")) for r in of(records, kind="end")}
    assert ends == {"one": 3, "two": None, "three": 0, "four": "no_such_module is not there"}
    text = (visit.out / "summary.md").read_text()
    assert capsys.readouterr().out.endswith(text)
    for line in ("exit code 3", "stopped at its limit", "- three: c: E: c", "left out: no_such_module is not there"):
        assert line in text
    assert text.endswith("Check FAILED.\n")
    assert "stopped after 3 s" in (visit.out / "log.txt").read_text()
    assert {p.name for p in visit.out.iterdir()} == {"results.jsonl", "log.txt", "summary.md"}
    time.sleep(max(0.0, 6 - (time.monotonic() - start)))
    assert not (tmp_path / "grandchild").exists()  # what a stage started is stopped with it


def test_a_summary_is_there_after_every_stage_and_time_that_is_up_begins_none(tmp_path):
    visit = visit_of(tmp_path)
    look = "note('a', 'one' in (Path(sys.argv[1]).parent / 'summary.md').read_text())"
    stages = (stage("one", "note('x', True)"), stage("two", look), stage("three", "note('b', True)"))
    assert gpu_check.check(visit, stages[:2], 100.0) == 0
    assert gpu_check.check(visit, stages[2:], 4.0) == 0
    (end,) = of(read(visit.records), "three", "end")
    assert end["skipped"] == "4 s are left"


def test_a_visit_that_is_cut_short_has_not_passed(tmp_path):
    """Nor do its records say so when nothing could write an end of the stage."""
    path = tmp_path / "r.jsonl"
    append(path, "environment", "environment", device="X", stages=["one", "two"])
    append(path, "one", "begin", limit=60)
    append(path, "one", "case", name="a", passed=True, seconds=0.1)
    assert summary.failing(read(path)) == [f"{name}: had not ended when the visit did" for name in ("one", "two")]
    text = summary.render(path)
    assert "under way when the visit ended" in text and "not begun when the visit ended" in text
    assert text.endswith("Check FAILED.\n")
    append(path, "one", "end", code=0, seconds=1.0)
    assert summary.exit_code(path) == 1
    append(path, "two", "end", skipped="2 s are left")
    assert summary.exit_code(path) == 0 and summary.failing(read(path)) == []


def processes_of(folder: Path) -> list[str]:
    """Of the processes that live, those whose command or environment names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ")
            if str(folder).encode() in command + (path / "environ").read_bytes():
                found.append(command.decode(errors="replace"))
        except OSError:
            continue
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("number", "stage", "count"),
    # The check, its stage, the stage's shard; pytest is a fourth.
    [(signal.SIGTERM, "smoke", 3), (signal.SIGKILL, "smoke", 3), (signal.SIGKILL, "tests", 4)],
)
def test_what_a_check_started_ends_with_it(number, stage, count, tmp_path):
    out = tmp_path / "out"
    with subprocess.Popen(
        [sys.executable, "-m", "bench.gpu_check", str(out), "--rehearse", "--stages", stage],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"},
        stdout=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        until = time.monotonic() + 120
        while not of(read(out / "results.jsonl"), stage, "case-begin") and time.monotonic() < until:
            time.sleep(0.1)
        assert len(processes_of(out)) == count
        process.send_signal(number)
        code = process.wait(10)
    until = time.monotonic() + 5
    while processes_of(out) and time.monotonic() < until:
        time.sleep(0.1)
    assert processes_of(out) == []
    size = (out / "results.jsonl").stat().st_size
    if number == signal.SIGTERM:
        assert code == 143
        text = (out / "summary.md").read_text()
        assert "under way when the visit ended" in text and text.endswith("Check FAILED.\n")
    time.sleep(1.0)
    assert (out / "results.jsonl").stat().st_size == size


def test_an_elastic_stage_takes_the_time_that_is_left_but_not_what_later_ones_need(tmp_path):
    visit = Visit(out=tmp_path)
    first, middle, last = stage("a", "", 10.0), stage("b", "", 20.0, elastic=True), stage("c", "", 30.0)
    assert gpu_check._limit(middle, (last,), 90.0, visit) == 60.0
    assert gpu_check._limit(middle, (last,), 15.0, visit) == 15.0
    assert gpu_check._limit(first, (middle, last), 90.0, visit) == 10.0


def test_the_plan_fits_into_its_time():
    assert WHOLE <= 480
    assert sum(stage.seconds for stage in STAGES) <= WHOLE - 10
    names = [stage.name for stage in STAGES]
    assert names[:5] == ["smoke", "headline", "precompile", "tests", "benchmark"]
    assert names.index("compiled") > names.index("updates")


def test_a_short_rehearsal_runs_real_stages(tmp_path):
    """The others' commands are tried in tests/bench/test_visit.py."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.gpu_check", str(tmp_path / "out"), "--rehearse", "--stages", "headline,profile"],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT / 'kernels'}{os.pathsep}{ROOT}"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-3000:]
    records = read(tmp_path / "out" / "results.jsonl")
    assert {r["row"]["shape"] for r in of(records, "headline", "row")} >= {"linear:64x32x490of500"}
    assert len(of(records, "profile", "kernels")) == 2
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "A rehearsal on a CPU" in text and text.endswith("Check passed.\n")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "log.txt", "results.jsonl", "summary.md", "trace.json.gz",
    ]  # fmt: skip
    assert json.loads((tmp_path / "out" / "results.jsonl").read_text().splitlines()[0])["rehearsal"] is True

"""Test the ops on this machine's GPU, measure them, and write a summary, in one command under nine minutes.

    make gpu-check OUT=dir          or      PYTHONPATH=kernels:. python3 -m bench.gpu_check dir

Needs one NVIDIA GPU, torch, triton, pytest and numpy; what else is installed takes part as a peer. Neither the
project nor a virtual environment has to be installed. Writes into `dir`:

    tests.log tests.xml     the tests of tests/gpu, as text and as JUnit
    bench.log ops.json      the benchmark of bench/ops.py at the shapes for GPUs
    updates.log updates.json    bench/updates.py: a step's updates at real model sizes; needs the trainer's packages
    environment.json        device, driver, versions
    summary.md              what was printed last: failed tests, targets reached and missed, peers

Exit code 0; 1 when a test fails or an op answers wrongly in the benchmark; 2 when nothing could be run. A missed
target is shown and changes nothing.
"""

import argparse
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BadArgument, run_command

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/gpu/test_ops_on_gpu.py", "tests/gpu/test_edges_on_gpu.py", "tests/gpu/test_attention_on_gpu.py")
NEEDED = ("torch", "triton", "pytest", "numpy")
WHOLE = 525.0  # seconds for everything
TEST_SECONDS, BENCH_SECONDS, LEAST_BENCH_SECONDS, UPDATE_SECONDS = 200.0, 330.0, 30.0, 85.0
GRACE = 25.0  # a row under way when the benchmark's time is over may still end


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A finished command. code: its exit code, None when it was stopped for its time."""

    code: int | None
    seconds: float


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("gpu-check", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("out", type=Path, help="folder for the results; made if absent")
    options = parser.parse_args(arguments)
    environment = describe()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "environment.json").write_text(json.dumps(environment, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadArgument(f"{options.out} cannot be written ({error.strerror}); give another folder.") from None
    return check(options.out, environment)


def describe() -> dict[str, object]:
    """Device and versions. Raises BadArgument where nothing could be run."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise BadArgument(f"the package {name} is missing; install it for {sys.executable}.")
    import torch
    import triton

    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        raise BadArgument(f"no NVIDIA GPU: {built}; run it on a machine with a GPU and a CUDA build of torch.")
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def check(out: Path, environment: dict[str, object]) -> int:
    """Tests, benchmark, summary; each runs whatever became of the one before."""
    start = time.monotonic()
    for stale in ("tests.xml", "ops.json", "updates.json", "summary.md"):
        (out / stale).unlink(missing_ok=True)
    tests = run(test_command(out), out / "tests.log", TEST_SECONDS)
    left = WHOLE - (time.monotonic() - start) - GRACE - UPDATE_SECONDS
    budget = max(LEAST_BENCH_SECONDS, min(BENCH_SECONDS, left))
    bench = run(bench_command(out, budget), out / "bench.log", budget + GRACE)
    updates = run(updates_command(out), out / "updates.log", UPDATE_SECONDS)
    text, code = summary(out, environment, tests, bench, updates)
    (out / "summary.md").write_text(text, encoding="utf-8")
    print("\n" + text, end="", flush=True)
    return code


def test_command(out: Path) -> list[str]:
    config = ["-c", "tests/gpu/pytest.ini", "--rootdir", ".", "-p", "no:cacheprovider"]
    report = ["-ra", "--tb=short", "--durations=10", f"--junitxml={out.resolve() / 'tests.xml'}"]
    return [sys.executable, "-m", "pytest", *config, *report, *TESTS]


def bench_command(out: Path, budget: float) -> list[str]:
    json_file = str(out.resolve() / "ops.json")
    return [sys.executable, "-m", "bench.ops", "--shapes", "gpu", "--json", json_file, "--budget-s", f"{budget:.0f}"]


def updates_command(out: Path) -> list[str]:
    """The second model starts only when the first was quick, so that both end in time."""
    json_file = str(out.resolve() / "updates.json")
    return [sys.executable, "-m", "bench.updates", "--json", json_file, "--budget-s", f"{UPDATE_SECONDS / 3:.0f}"]


def run(command: list[str], log: Path, limit: float) -> Ran:
    """Run from the project's folder, printing and writing to `log`; stop it, and what it started, after `limit` s."""
    paths = [str(ROOT / "kernels"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        with log.open("w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                print(line, end="", flush=True)
            process.wait()
            if stopped.is_set():
                file.write(f"stopped after {limit:.0f} s\n")
    finally:
        timer.cancel()
    return Ran(code=None if stopped.is_set() else process.returncode, seconds=time.monotonic() - start)


# ---- the summary -----------------------------------------------------------------------------------------------


def summary(out: Path, environment: dict[str, object], tests: Ran, bench: Ran, updates: Ran) -> tuple[str, int]:
    """(Markdown, exit code) from what the commands left in `out`. Updates that could not be timed fail nothing: the
    trainer's packages may be absent."""
    test_text, tests_failed = test_summary(out / "tests.xml", tests)
    bench_text, bench_failed = bench_summary(out / "ops.json", bench)
    title = ", ".join(f"{environment[key]}" for key in ("device", "capability"))
    versions = ", ".join(f"{key} {environment[key]}" for key in ("python", "torch", "cuda", "triton"))
    failed = tests_failed or bench_failed
    ending = "FAILED" if failed else "passed"
    parts = (
        *(f"# GPU check: {title}", versions),
        *("## Tests", test_text),
        *("## Benchmark", bench_text),
        *("## Updates of a step", updates_summary(out, updates)),
        f"Check {ending}.",
    )
    return "\n\n".join(parts) + "\n", int(failed)


def test_summary(report: Path, ran: Ran) -> tuple[str, bool]:
    """What pytest's JUnit report says; failed also when it is missing or nothing ran on the GPU."""
    if ran.code is None:
        return f"Stopped after {ran.seconds:.0f} s; see tests.log.", True
    try:
        suite = ElementTree.parse(report).getroot().find("testsuite")
        total, broken, skipped = (int(suite.get(k)) for k in ("tests", "failures", "skipped"))
        errors = int(suite.get("errors"))
    except (OSError, ElementTree.ParseError, AttributeError, TypeError):
        return f"pytest ended with code {ran.code} and left no report; see tests.log.", True
    passed = total - broken - errors - skipped
    lines = [f"{passed} passed, {broken + errors} failed, {skipped} skipped in {ran.seconds:.0f} s."]
    for case in suite.iter("testcase"):
        wrong = next((found for kind in ("failure", "error") if (found := case.find(kind)) is not None), None)
        if wrong is not None:
            message = (wrong.get("message") or "").splitlines()
            lines.append(f"- FAILED {case.get('name')}: {message[0][:200] if message else ''}")
    return "\n".join(lines), ran.code != 0 or passed == 0


def bench_summary(report: Path, ran: Ran) -> tuple[str, bool]:
    """The targets and peers of ops.json; failed when it is missing or an op of ours was wrong."""
    from bench.targets import judge, missing, read_document, verdict_table

    ended = f"stopped after {ran.seconds:.0f} s" if ran.code is None else f"ended with code {ran.code}"
    try:
        document, rows = read_document(report)
    except (OSError, ValueError, TypeError) as error:
        return f"bench.ops {ended} and left no results ({error}); see bench.log.", True
    verdicts = judge(rows)
    reached = [verdict for verdict in verdicts if verdict.percent is not None]
    lines = [
        f"{len(rows)} rows in {ran.seconds:.0f} s; {sum(v.reached for v in reached)} of {len(reached)} rows with a "
        f"target reach it; {sum(v.faster is True for v in verdicts)} of {sum(v.faster is not None for v in verdicts)} "
        "are ahead of every peer.",
        f"Measured rates: {json.dumps(document.get('floors', {}))}",
        verdict_table(verdicts) if verdicts else "No row of ours.",
    ]
    lines += [f"Not measured: {t.op} {t.mode} ({t.says}), target {t.percent:.0f}%." for t in missing(rows)]
    for entry in document.get("absent", []):
        if entry.get("kind") == "failed":
            lines.append(f"FAILED {entry['backend']} {entry['op']} {entry['mode']} {entry['shape']}: {entry['reason']}")
    if ran.code != 0:
        lines.append(f"bench.ops {ended}; see bench.log.")
    return "\n\n".join(lines), ran.code != 0


def updates_summary(out: Path, ran: Ran) -> str:
    """The table of updates.json; without it, the last line that the command printed."""
    from bench.updates_report import MFU_GOAL, render

    try:
        document = json.loads((out / "updates.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ended = f"stopped after {ran.seconds:.0f} s" if ran.code is None else f"ended with code {ran.code}"
        lines = (out / "updates.log").read_text(encoding="utf-8").strip().splitlines()
        return f"Not measured, bench.updates {ended}: {lines[-1] if lines else 'it printed nothing'}"
    return f"{render(document)}\n\nGoal of the policy's update, prompts shared: {MFU_GOAL} % model FLOPs utilisation."


if __name__ == "__main__":
    sys.exit(main())

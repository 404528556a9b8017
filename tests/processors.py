"""The tests of the operations under other processors' arithmetic: `python -m tests.processors [--quick] [SETTING ...]`.

What a library computes with is chosen from the processor, the threads and the shape. Each setting makes it choose
otherwise, or (`forwards`, `backwards`, `halves`) replaces torch's matrix products by ones that add up in an order that
is legal and hostile. Every test must pass under every setting. Exit status 1 if one fails.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.product_orders import ORDERS

ROOT = Path(__file__).parents[1]
OLD = {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"}
SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "aten": {"ATEN_CPU_CAPABILITY": "default"},  # torch's own kernels without AVX2
    "mkl": {"MKL_CBWR": "COMPATIBLE"},  # one code path on every processor
    "onednn": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "old": OLD,  # all three together
    "two": {"OMP_NUM_THREADS": "2"},
    **{order: {"AIRL_PRODUCT_ORDER": order, "PYTEST_ADDOPTS": "-p tests.product_orders"} for order in ORDERS},
}
QUICK_SETTINGS = ("old",)
FULL = (
    "tests/airl_kernels",
    "--ignore=tests/airl_kernels/test_interpreted.py",  # numpy computes there
    "tests/bench/test_ops.py",
    "tests/bench/test_verify.py",
    "tests/gpu/test_ops_on_gpu.py",
    "tests/gpu/test_edges_on_gpu.py",
)
QUICK = tuple(
    f"tests/airl_kernels/test_{name}.py"
    for name in ("logprob", "linear_policy_loss", "rows", "selective", "policy_loss", "token_head", "returns", "native")
)


@dataclass(frozen=True, slots=True)
class Outcome:
    setting: str
    passed: int
    skipped: int
    failed: tuple[str, ...]
    seconds: float

    def line(self) -> str:
        return f"{self.setting:<10} {self.passed:>7} {self.skipped:>8} {len(self.failed):>7} {self.seconds:>8.0f}"


def run(setting: str, tests: Sequence[str], processes: int) -> Outcome:
    """One process of pytest; two threads have the cores to themselves. A run that breaks off counts as a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AIRL_GPU_TESTS_DEVICE": "cpu", **SETTINGS[setting]}
    if setting in ORDERS:  # that file puts orders in place itself
        tests = [*tests, "--ignore=tests/airl_kernels/test_product_orders.py"]
    workers = [] if setting == "two" else ["-n", str(processes), "--dist", "loadfile"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "--timeout=1800",
            *workers,
            f"--junit-xml={report}",
        ]
        done = subprocess.run(
            [*command, *tests], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    failed = [f"{c.get('classname')}::{c.get('name')}" for c in cases if {"failure", "error"} & {e.tag for e in c}]
    skipped = sum(any(e.tag == "skipped" for e in case) for case in cases)
    if done.returncode and not failed:
        failed = [f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}"]
    passed = len(cases) - skipped - len(failed) if cases else 0
    return Outcome(setting, passed, skipped, tuple(failed), time.monotonic() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.processors", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("settings", nargs="*", metavar="SETTING", help=f"{', '.join(SETTINGS)}; all of them if none")
    parser.add_argument(
        "--quick", action="store_true", help=f"the ops alone, under {', '.join(QUICK_SETTINGS)} if none"
    )
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of pytest, each of one thread")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.settings) - SETTINGS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: give some of {', '.join(SETTINGS)}.")
    print(f"{'setting':<10} {'passed':>7} {'skipped':>8} {'failed':>7} {'seconds':>8}", flush=True)
    failed = False
    for setting in chosen.settings or (QUICK_SETTINGS if chosen.quick else SETTINGS):
        outcome = run(setting, QUICK if chosen.quick else FULL, chosen.processes)
        print(outcome.line(), *(f"  {name}" for name in outcome.failed), sep="\n", flush=True)
        failed |= bool(outcome.failed or not outcome.passed)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

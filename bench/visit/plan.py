"""The stages of a visit in their order, with the seconds that each may take at most; together less than 480.

A stage that ends early leaves its time to the next elastic one. A rehearsal runs the same stages on a CPU at toy
shapes.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.carry import kernel_list

WHOLE = 480.0  # seconds, the summary included
WHOLE_REHEARSAL = 1400.0  # two minutes on two idle cores; a busy machine may take its time
_GRACE = 12.0  # seconds for the row that is under way when a stage's budget is used


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """Where results go, and on what the stages run. records: JSON lines of every stage. trace: the profile's."""

    out: Path
    rehearse: bool = False

    @property
    def records(self) -> Path:
        return self.out / "results.jsonl"

    @property
    def trace(self) -> Path:
        return self.out / "trace.json.gz"

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def jobs(self, most: int) -> str:
        return "1" if self.rehearse else str(max(1, min(most, os.cpu_count() or 1)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """seconds: at most, killed after; toy_seconds: likewise in a rehearsal, None where there is nothing to rehearse.
    command: given the visit and the seconds it has. module: what it needs. elastic: takes the time that earlier
    stages left."""

    name: str
    seconds: float
    toy_seconds: float | None
    command: Callable[[Visit, float], list[str]]
    module: str | None = None
    elastic: bool = False

    def limit(self, visit: Visit) -> float:
        return (self.toy_seconds or 0.0) if visit.rehearse else self.seconds

    def absent(self, visit: Visit) -> str | None:
        """Why it cannot run here, in half a sentence."""
        if visit.rehearse and self.toy_seconds is None:
            return "it is for a GPU alone"
        if self.module is None or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.module} is not there"


def _module(name: str, visit: Visit, *flags: str) -> list[str]:
    return [sys.executable, "-m", name, "--records", str(visit.records), *flags]


def _budget(visit: Visit, limit: float) -> list[str]:
    return ["--budget-s", f"{limit / 2 if visit.rehearse else max(limit - _GRACE, 1):.0f}"]


def _smoke(visit: Visit, limit: float) -> list[str]:
    return _module("bench.visit.smoke", visit, "--device", visit.device, "--jobs", visit.jobs(6))


def _headline(visit: Visit, limit: float) -> list[str]:
    return _module(
        "bench.visit.benchmark", visit, "--stage", "headline", "--device", visit.device, *_budget(visit, limit)
    )


def _benchmark(visit: Visit, limit: float) -> list[str]:
    return _module(
        "bench.visit.benchmark", visit, "--stage", "benchmark", "--device", visit.device, *_budget(visit, limit)
    )


def _precompile(visit: Visit, limit: float) -> list[str]:
    """By the preflight's list, be it of sources that changed since: to record anew would take longer than the stage."""
    recorded = ["--recorded", str(kernel_list(90))] if kernel_list(90).exists() else []
    command = [sys.executable, "-m", "bench.precompile", "--arch", "90", "--jobs", visit.jobs(16), *recorded]
    return command + _budget(visit, limit)


def _tests(visit: Visit, limit: float) -> list[str]:
    toy = ["--keyword", "careful_torch and (gae or last_token)"] if visit.rehearse else []
    return _module("bench.visit.tests", visit, "--stage", "tests", "--jobs", visit.jobs(8), *toy)


def _compiled(visit: Visit, limit: float) -> list[str]:
    toy = ["--keyword", "gae"] if visit.rehearse else []
    return _module("bench.visit.tests", visit, "--stage", "compiled", "--jobs", visit.jobs(6), *toy)


def _updates(visit: Visit, limit: float) -> list[str]:
    return _module("bench.visit.updates", visit, "--device", visit.device, *_budget(visit, limit))


def _steps(visit: Visit, limit: float) -> list[str]:
    return _module("bench.visit.steps", visit, "--device", visit.device)


def _profile(visit: Visit, limit: float) -> list[str]:
    flags = "--trace", str(visit.trace), "--device", visit.device, "--budget-s", f"{limit - 2:.0f}"
    return _module("bench.visit.profile", visit, *flags)


def _sweep(visit: Visit, limit: float) -> list[str]:
    return [
        sys.executable,
        "-m",
        "bench.chunk_sweep",
        "--json",
        str(visit.out / "chunk_sweep.json"),
        *_budget(visit, limit),
    ]


STAGES = (
    Stage(name="smoke", seconds=45, toy_seconds=240, command=_smoke),
    Stage(name="headline", seconds=60, toy_seconds=150, command=_headline),
    Stage(name="precompile", seconds=35, toy_seconds=None, command=_precompile),
    Stage(name="tests", seconds=65, toy_seconds=180, command=_tests, module="pytest"),
    Stage(name="benchmark", seconds=80, toy_seconds=200, command=_benchmark, elastic=True),
    Stage(name="updates", seconds=60, toy_seconds=180, command=_updates),
    Stage(name="steps", seconds=35, toy_seconds=150, command=_steps),
    Stage(name="profile", seconds=30, toy_seconds=100, command=_profile),
    Stage(name="compiled", seconds=38, toy_seconds=180, command=_compiled, module="pytest"),
    Stage(name="chunk_sweep", seconds=20, toy_seconds=None, command=_sweep, elastic=True),
)

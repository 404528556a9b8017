"""Verify, then time, every case at every shape for every backend; stop adding rows when the time is up."""

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from bench import peers
from bench.cases import CASES, Backend, Case, Run, Unsupported
from bench.costs import Cost, cost_of
from bench.errors import first_line
from bench.floors import Probe, probe_for
from bench.inputs import Inputs, make_inputs
from bench.memory import peak_mib
from bench.peers._limits import require_room_for_logits
from bench.results import Absent, Row
from bench.shapes import Shape
from bench.timing import Timing, measure, sets_needed
from bench.verify import Check, Yardstick

_SLOWEST_PROFILED_MS = 500.0  # the profiler records every operator of a call on the CPU
_EASE = 2.0  # a problem may take this many times its even share of what is left of the budget


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run on. budget: seconds for all problems, None for no end. seconds: of timing per row, about."""

    device: torch.device
    device_name: str
    commit: str
    dtype: torch.dtype
    backends: tuple[Backend, ...]
    budget: float | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    case: Case
    shape: Shape

    def absent(self, kind: str, backend: Backend, reason: str) -> Absent:
        case = self.case
        return Absent(kind=kind, op=case.op, mode=case.mode, shape=self.shape.name, backend=backend.NAME, reason=reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A backend that passed its verification."""

    backend: Backend
    run: Run
    check: Check


class Budget:
    """Seconds that are left, and what one more problem may take of them."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.seconds, self.start = clock, seconds, clock()

    def spent(self) -> float:
        return self.clock() - self.start

    def is_used(self) -> bool:
        return self.seconds is not None and self.spent() >= self.seconds

    def deadline(self, problems_left: int) -> float | None:
        """The `spent()` beyond which a problem adds no further peers."""
        if self.seconds is None:
            return None
        return self.spent() + _EASE * max(self.seconds - self.spent(), 0.0) / problems_left


def problems(shapes: Sequence[Shape], ops: Sequence[str]) -> list[Problem]:
    """The cases with a target first; then in the order of the shapes."""
    found = [
        Problem(case=case, shape=shape) for case in CASES for shape in shapes if case.op in ops and case.runs_at(shape)
    ]
    order = {shape.name: number for number, shape in enumerate(shapes)}
    return sorted(found, key=lambda problem: (problem.case.rank, order[problem.shape.name]))


def run_all(todo: Sequence[Problem], settings: Settings, progress: Callable[[str], None]) -> Iterator[Row | Absent]:
    """Yield rows and what is missing, problem by problem; a problem that cannot even be set up is one that failed."""
    budget = Budget(settings.budget)
    for number, problem in enumerate(todo):
        name = f"{problem.case.op} {problem.case.mode} {problem.shape.name}"
        progress(f"[{number + 1}/{len(todo)}, {budget.spent():.0f} s] {name}")
        if budget.is_used():
            reason = f"the {settings.budget:g} s of --budget-s were used up."
            yield from (problem.absent("left out", backend, reason) for backend in settings.backends)
            continue
        try:
            yield from _run(problem, settings, budget, budget.deadline(len(todo) - number))
        except (RuntimeError, MemoryError) as error:  # torch's own, running out of memory among them
            yield problem.absent("failed", peers.airl, f"{type(error).__name__}: {first_line(error)}")
        gc.collect()
        if settings.device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # of a context that is dead, which the next call will tell
                torch.cuda.empty_cache()  # the next problem's estimate of what fits


def _run(problem: Problem, settings: Settings, budget: Budget, deadline: float | None) -> Iterator[Row | Absent]:
    case, shape, device, dtype = problem.case, problem.shape, settings.device, settings.dtype
    ready: list[Ready] = []
    yardstick = Yardstick(case, shape, dtype, device)
    full = make_inputs(case, shape, dtype, device)
    for backend in settings.backends:
        ours = backend is peers.airl
        if deadline is not None and budget.spent() > deadline and not ours:
            yield problem.absent("left out", backend, "the share of --budget-s of this problem was used up.")
            continue
        if case.inplace:
            full = make_inputs(case, shape, dtype, device)  # the last backend may have overwritten them
        outcome = _prepare(problem, backend, settings, yardstick, full, ours)
        if isinstance(outcome, Ready):
            ready.append(outcome)
        else:
            yield outcome
    del yardstick
    if ready:
        yield from _time(problem, ready, settings, full)


def _prepare(
    problem: Problem, backend: Backend, settings: Settings, yardstick: Yardstick, full: Inputs, ours: bool
) -> Ready | Absent:
    """Verify a backend; a peer that cannot run, or whatever goes wrong inside it, is a reason and not an end."""
    case, shape = problem.case, problem.shape
    try:
        reason = backend.unavailable(settings.device)
        if reason is not None:
            return problem.absent("skipped", backend, reason)
        run = backend.prepare(case, shape)
        if getattr(backend, "HOLDS_LOGITS", False):
            require_room_for_logits(case, shape, settings.device, settings.dtype)
        check = yardstick.check(
            run, full, ours=ours, tolerance=getattr(backend, "TOLERANCE", 0.0),
            one_shape=getattr(backend, "COMPILES_FOR_A_SHAPE", False),
        )  # fmt: skip
    except Unsupported as error:
        return problem.absent("skipped", backend, str(error))
    except torch.OutOfMemoryError:
        return problem.absent("failed" if ours else "skipped", backend, "out of memory.")
    except Exception as error:
        return problem.absent("failed", backend, f"{type(error).__name__}: {first_line(error)}")
    if not check.passed:
        reason = f"wrong: {check.what} is off by {check.error:.2g} of its size, allowed are {check.budget:.2g}."
        return problem.absent("failed", backend, reason)
    return Ready(backend=backend, run=run, check=check)


def _time(problem: Problem, ready: list[Ready], settings: Settings, full: Inputs) -> Iterator[Row]:
    case, shape, device, dtype = problem.case, problem.shape, settings.device, settings.dtype
    cost = cost_of(case, shape, dtype.itemsize)
    count = sets_needed(cost.bytes, device)
    sets = [full, *(make_inputs(case, shape, dtype, device, seed) for seed in range(1, count))]
    probe = probe_for(cost, full, device)
    calls = {probe.name: probe.call} | {entry.backend.NAME: _call(entry.run, sets) for entry in ready}
    timings = measure(calls, device, num_sets=count, seconds=settings.seconds)
    probed = timings.pop(probe.name).median
    del sets[1:]
    # Timing has warmed up every backend, so that no compilation is left for the measurement of memory.
    peaks = {entry.backend.NAME: _peak(entry.run, full, timings[entry.backend.NAME], device) for entry in ready}
    for entry in ready:
        name = entry.backend.NAME
        others = [other for other in timings if other != name] if entry.backend is peers.airl else []
        yield _row(
            problem, settings, entry, timings[name], cost, probe, probed, peaks[name],
            {other: timings[other].median / timings[name].median for other in others},
            {other: peaks[other] / peaks[name] for other in others if peaks[name] and peaks[other]},
        )  # fmt: skip


def _peak(run: Run, full: Inputs, timing: Timing, device: torch.device) -> float | None:
    if device.type == "cpu" and timing.median > _SLOWEST_PROFILED_MS:
        return None
    return peak_mib(lambda: run(full), device)


def _call(run: Run, sets: Sequence[Inputs]) -> Callable[[int], object]:
    return lambda number: run(sets[number])


def _row(
    problem: Problem, settings: Settings, entry: Ready, timing: Timing, cost: Cost, probe: Probe,
    probed_ms: float, peak: float | None,
    time_ratios: dict[str, float], memory_ratios: dict[str, float],
) -> Row:  # fmt: skip
    floor_ms = probe.floor_ms(cost, probed_ms)
    sequences = problem.shape.family == "sequences"  # these are float32 whatever the models' type
    return Row(
        device=settings.device_name,
        commit=settings.commit,
        op=problem.case.op,
        mode=problem.case.mode,
        shape=problem.shape.name,
        dtype="float32" if sequences else str(settings.dtype).removeprefix("torch."),
        backend=entry.backend.NAME,
        ms=timing.median,
        ms_p20=timing.p20,
        ms_p80=timing.p80,
        samples=timing.samples,
        bytes=cost.bytes,
        gb_per_s=cost.bytes / timing.median / 1e6,
        flops=cost.flops,
        tflop_per_s=cost.flops / timing.median / 1e9,
        bound=cost.bound,
        floor_rate=probe.rate(probed_ms),
        floor_ms=floor_ms,
        percent_of_floor=100 * floor_ms / timing.median,
        peak_mib=peak,
        error=entry.check.error,
        budget=entry.check.budget,
        ratio_to_peer=time_ratios,
        memory_ratio_to_peer=memory_ratios,
    )

"""Fill Triton's cache with every kernel that a GPU visit launches, on all cores, with or without a GPU.

    python -m bench.precompile --arch 90 --jobs 16 [--budget-s 60] [--json OUT.json] [--recorded IN.json]
    python -m bench.precompile --list           which kernels those are, and who launches them first
    python -m bench.precompile --verify         fill, then run the callers again: nothing may be left to compile

The list is recorded from the callers themselves (`callers.py`), or read from an earlier --json: from
.carry/kernels-sm90.json where it is of the same sources, from --recorded as it is. What sources that changed since
launch besides is then not in the cache, and a kernel that they no longer have is named as one that does not compile.
Where Triton compiles a C stub for each signature at its first launch, that is made as well. The cache is Triton's own
(TRITON_CACHE_DIR). A kernel that does not compile is named, and the others go on. Exit code 1 when a kernel does not
compile, a caller does not run to its end or, with --verify, something was left to compile.
"""

import hashlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.callers import CALLERS, ROOT, Recording, compile_all, record
from bench.carry import kernel_list
from bench.errors import BadArgument, Parser, run_command
from bench.recording import Specialisation
from bench.stubs import Compiled, compile_one
from bench.tied import end_with_parent

_EVERY = 5.0  # seconds between lines of progress


@dataclass(slots=True, kw_only=True)
class Outcome:
    """left: kernels that the budget left out. uncached: callers that still had to compile something, and how much.
    known_broken: what did not run to its end when a list that is used again was recorded."""

    arch: int
    jobs: int
    specialisations: list[Specialisation] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)
    known_broken: list[str] = field(default_factory=list)
    compiled: list[Compiled] = field(default_factory=list)
    left: int = 0
    uncached: dict[str, int] = field(default_factory=dict)
    recorded_s: float = 0.0
    seconds: float = 0.0

    @property
    def failed(self) -> list[Compiled]:
        return [entry for entry in self.compiled if entry.error]

    @property
    def broken(self) -> list[str]:
        return [*self.known_broken, *(line for recording in self.recordings for line in recording.broken)]

    @property
    def code(self) -> int:
        return int(bool(self.failed or self.broken or sum(self.uncached.values())))


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench.precompile", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise BadArgument("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it.")
    if options.jobs < 1:
        raise BadArgument(f"--jobs {options.jobs}: give 1 or more processes.")
    callers = CALLERS if options.callers is None else tuple(name for name in options.callers.split(",") if name)
    for name in callers:
        if name not in CALLERS:
            raise BadArgument(f"--callers {name}: give some of {', '.join(CALLERS)}.")
    carried = kernel_list(options.arch)
    listed = options.recorded or (carried if carried.exists() and options.callers is None else None)
    known = None if listed is None else read_list(listed)
    if known is not None and known["sources"] != sources():
        instead = "it is taken as it is" if options.recorded else "the callers are run instead"
        print(f"{listed} is of other sources; {instead}.", flush=True)
        known = known if options.recorded else None
    work = Precompiler(arch=options.arch, jobs=options.jobs, budget=options.budget_s, say=_say)
    outcome = work.run(callers, known, compile_them=not options.list, verify=options.verify)
    for entry in outcome.specialisations if options.list else ():
        print(f"{entry.name}    {entry.caller}")
    print(summary(outcome), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document(outcome), indent=1) + "\n", encoding="utf-8")
    return outcome.code


def _parser() -> Parser:
    parser = Parser(prog="python -m bench.precompile", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten (default 90)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--budget-s", type=float, help="start no further kernel after this many seconds")
    parser.add_argument("--callers", help=f"comma-separated, of {', '.join(CALLERS)} (default: all)")
    parser.add_argument("--recorded", type=Path, metavar="IN.json", help="an earlier --json, whatever changed since")
    parser.add_argument("--json", type=Path, metavar="OUT.json", help="write the list, with seconds and failures")
    parser.add_argument("--list", action="store_true", help="print the list, compile nothing")
    parser.add_argument("--verify", action="store_true", help="run the callers again on the filled cache")
    return parser


def _say(line: str) -> None:
    print(line, flush=True)


class Precompiler:
    """A pool of processes that first run the callers and then compile what those launch, the longest first."""

    def __init__(self, *, arch: int, jobs: int, budget: float | None = None, say: Callable[[str], None]) -> None:
        self.outcome = Outcome(arch=arch, jobs=jobs)
        self.budget, self.say, self.start = budget, say, time.monotonic()
        # What every process needs is imported once, before they part. Nothing here touches a GPU or starts a thread.
        import airl_kernels  # noqa: F401
        from triton.runtime.cache import triton_key

        triton_key()

    def run(self, callers: Sequence[str], known: dict | None, *, compile_them: bool, verify: bool) -> Outcome:
        outcome = self.outcome
        try:
            with self._pool() as pool:
                if known is None:
                    self._record(pool, callers)
                else:
                    outcome.specialisations = [Specialisation(**entry) for entry in known["specialisations"]]
                    outcome.known_broken = known.get("broken", [])
                outcome.recorded_s = time.monotonic() - self.start
                if compile_them:
                    self._compile(pool)
            if verify and not outcome.left:
                with self._pool(1) as pool:
                    done = self._each(pool, compile_all, callers, "run again")
                    outcome.uncached = {name: hits.count(False) for name, hits in done}
        except BrokenProcessPool:
            self._lost()
        outcome.seconds = time.monotonic() - self.start
        return outcome

    def _pool(self, tasks_per_process: int | None = None) -> ProcessPoolExecutor:
        """A visit's workers would wait for work for ever when this process is killed, so they end with it. The others
        are --verify's, which no visit asks for."""
        if tasks_per_process is None:
            fork, ends = multiprocessing.get_context("fork"), (os.getpid(),)
            return ProcessPoolExecutor(self.outcome.jobs, fork, end_with_parent, ends)
        return ProcessPoolExecutor(self.outcome.jobs, multiprocessing.get_context("forkserver"), max_tasks_per_child=1)

    def _record(self, pool: ProcessPoolExecutor, callers: Sequence[str]) -> None:
        found: dict[Specialisation, Specialisation] = {}
        for caller, recording in self._each(pool, record, callers, "run"):
            new = [entry for entry in recording.found if found.setdefault(entry, entry) is entry]
            self.say(
                f"{caller}: {recording.runs} cases, {recording.launches} launches of {len(recording.found)} kernels, "
                f"{len(new)} of them new"
            )
            for line in recording.broken:
                self.say(f"    broken: {line}")
            self.outcome.recordings.append(recording)
        self.outcome.specialisations = list(found)

    def _compile(self, pool: ProcessPoolExecutor) -> None:
        todo = sorted(self.outcome.specialisations, key=lambda entry: -entry.weight)
        done = self._each(pool, compile_one, todo, "compiled")
        self.outcome.compiled = [compiled for _, compiled in done]
        self.outcome.left = len(todo) - len(self.outcome.compiled)

    def _each(self, pool: ProcessPoolExecutor, task: Callable, items: Sequence, what: str) -> Iterable[tuple]:
        """(item, result) as they end; those that the budget leaves out are missing."""
        futures: dict[Future, object] = {pool.submit(task, item, self.outcome.arch): item for item in items}
        waiting, results, said = set(futures), [], time.monotonic()
        while waiting:
            ended, waiting = wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
            results += [(futures[future], future.result()) for future in ended if not future.cancelled()]
            spent = time.monotonic() - self.start
            if self.budget is not None and spent > self.budget:
                waiting = {future for future in waiting if not future.cancel()}
            if time.monotonic() - said > _EVERY:
                said = time.monotonic()
                self.say(f"{what} {len(results)} of {len(futures)}, {spent:.0f} s")
        return results

    def _lost(self) -> None:
        """A process died, taking what it worked on with it."""
        outcome = self.outcome
        entry = Compiled(name="a process of the pool", seconds=0.0, hit=False, stub_s=0.0, error="it was killed")
        outcome.compiled.append(entry)
        outcome.left = len(outcome.specialisations) - len(outcome.compiled) + 1


# ---- what is written -------------------------------------------------------------------------------------------


def summary(outcome: Outcome) -> str:
    compiled = outcome.compiled
    fresh = [entry for entry in compiled if not entry.hit and not entry.error]
    serial, stubs = sum(entry.seconds for entry in compiled), sum(entry.stub_s for entry in compiled)
    lines = [
        f"sm_{outcome.arch}: {len(outcome.specialisations)} kernels, known after {outcome.recorded_s:.0f} s; "
        f"{len(fresh)} compiled, {sum(entry.hit for entry in compiled)} were there, {len(outcome.failed)} failed, "
        f"{outcome.left} left out; {outcome.seconds:.0f} s with {outcome.jobs} processes, "
        f"{serial:.0f} s of compiling and {stubs:.0f} s of C stubs"
    ]
    lines += [f"FAILED {entry.name}: {entry.error}" for entry in outcome.failed]
    lines += [f"BROKEN {line}" for line in outcome.broken]
    if outcome.uncached:
        lines.append(f"run again: {sum(outcome.uncached.values())} kernels were not in the cache")
        lines += [f"UNCACHED {name}: {count}" for name, count in outcome.uncached.items() if count]
    return "\n".join(lines)


def document(outcome: Outcome) -> dict:
    import triton

    return {
        "triton": triton.__version__,
        "sources": sources(),
        **{name: getattr(outcome, name) for name in ("arch", "jobs", "recorded_s", "seconds", "left", "uncached")},
        "broken": outcome.broken,
        "compiled": [asdict(entry) for entry in outcome.compiled],
        "specialisations": [asdict(entry) for entry in outcome.specialisations],
    }


def read_list(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = {name: found[name] for name in ("sources", "specialisations", "broken")}
        for entry in known["specialisations"]:
            _ = Specialisation(**entry).name  # which reads all of its data
        if not all(isinstance(line, str) for line in known["broken"]):
            raise TypeError("broken is no list of sentences")
        return known
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadArgument(f"--recorded {path}: give a file that --json wrote ({error!r}).") from None


def sources() -> str:
    """A hash of what decides which kernels are launched: Triton's version, the kernels, their callers."""
    import triton

    found = hashlib.sha256(triton.__version__.encode())
    for folder in ("kernels/airl_kernels", "tests/gpu", "bench", "airl_fast"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

"""What can be known about a GPU visit without the GPU: run in an environment made like that of the GPU machine.

    make gpu-preflight          builds that environment (.venv-gpu, 3 GB) and runs this in it
    python -m bench.preflight [--only imports,private] [--jobs N] [--json OUT.json]

environment  versions are those of constraints-gpu.txt, and what the machine lacks comes from the carried folder alone
imports      every module of the kernels, the benchmark, the trainer and tests/gpu imports
private      torch, transformers and Triton still have what `private_api.py` lists
kernels      every kernel that a visit launches compiles for sm_90 (`precompile.py`)
rehearsal    the visit's own driver runs from end to end on the CPU at toy shapes

Prints a table; exit code 1 when anything failed. The list of kernels goes to .carry, from which a visit reads it.
The Triton kernels are not interpreted here: the interpreter of Triton 3.6 does not work with numpy 2.4 and later,
and the ordinary tests do it.
"""

import importlib
import importlib.util
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from bench.carry import FOLDER as CARRIED
from bench.carry import kernel_list
from bench.errors import BadArgument, Parser, run_command
from bench.report import table

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "constraints-gpu.txt"
RECORDED = kernel_list(90)
CARRIED_ONLY = ("pydantic", "datasets", "dill", "multiprocess", "trl", "liger_kernel", "cut_cross_entropy", "verl")
# Packages that no visit uses; a module of ours that needs one is left out.
UNUSED = ("bitsandbytes", "vllm", "fastapi", "starlette", "uvicorn", "tensorboard", "playwright")
UNUSED += ("matplotlib", "plotly")  # of `airl-fast report` and evaluations


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """problems: one sentence each. notes: what is worth knowing and fails nothing."""

    check: str
    done: str
    seconds: float
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench.preflight", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.preflight", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(CHECKS)} (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--json", type=Path, metavar="OUT.json")
    options = parser.parse_args(arguments)
    names = tuple(CHECKS) if options.only is None else tuple(name for name in options.only.split(",") if name)
    for name in names:
        if name not in CHECKS:
            raise BadArgument(f"--only {name}: give some of {', '.join(CHECKS)}.")
    results = []
    for name in names:
        print(f"---- {name}", flush=True)
        results.append(run(name, lambda check=CHECKS[name]: check(options.jobs)))
    print(render(results), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n", encoding="utf-8")
    return int(any(result.problems for result in results))


def run(name: str, check: Callable[[], tuple[str, Sequence[str], Sequence[str]]]) -> Result:
    """A check that breaks is a check that failed."""
    start = time.monotonic()
    try:
        done, problems, notes = check()
    except Exception as error:
        done, problems, notes = "broke off", [f"{type(error).__name__}: {error}"], []
    return Result(check=name, done=done, seconds=time.monotonic() - start, problems=tuple(problems), notes=tuple(notes))


def render(results: Sequence[Result]) -> str:
    rows = [
        (r.check, "FAILED" if r.problems else "passed", f"{r.seconds:.0f}", r.done, str(len(r.problems)))
        for r in results
    ]
    lines = [table(("check", "", "s", "what", "problems"), rows)]
    lines += [f"{r.check}: {note}" for r in results for note in r.notes]
    lines += [f"FAILED {r.check}: {problem}" for r in results for problem in r.problems]
    return "\n".join(lines)


# ---- the checks ------------------------------------------------------------------------------------------------


def check_environment(jobs: int):
    import torch

    pins = dict(line.split("==") for line in PINS.read_text().split() if "==" in line)
    carried = {path.stem.lower().replace("-", "_") for path in CARRIED.glob("*.dist-info")}
    problems, notes = [], []
    for name, wanted in pins.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "absent"
        if found.split("+")[0] != wanted and f"{name}-{found}".lower().replace("-", "_") in carried:
            notes.append(f"{name} {found} is carried and hides the machine's {wanted}")
        elif found.split("+")[0] != wanted:
            problems.append(f"{name} is {found}, the machine's list says {wanted}")
    for name in CARRIED_ONLY:
        spec = importlib.util.find_spec(name)
        origin = "" if spec is None else str(spec.origin or next(iter(spec.submodule_search_locations or [""])))
        if origin and not Path(origin).is_relative_to(CARRIED):
            problems.append(f"{name} is installed here and absent on the machine; it must come from {CARRIED.name}")
        elif not origin:
            notes.append(f"{name} is not carried; what needs it is left out of the visit")
    if torch.version.cuda is None:
        notes.append(f"torch {torch.__version__} is the build for CPUs; the machine's is for CUDA")
    python = ".".join(map(str, sys.version_info[:3]))
    return f"Python {python}, torch {torch.__version__}, {len(pins)} pins", problems, notes


def check_imports(jobs: int):
    import pytest

    problems, left, count = [], [], 0
    for name in modules():
        try:
            importlib.import_module(name)
            count += 1
        except ModuleNotFoundError as error:
            missing = (error.name or "").split(".")[0]
            (left if missing in UNUSED else problems).append(f"{name}: {error}")
        except pytest.skip.Exception as error:  # not an Exception
            left.append(f"{name}: {error}")
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    from bench.peers import BACKENDS

    peers = {backend.NAME: _peer(backend) for backend in BACKENDS}
    notes = [f"peer {name}: {reason}" for name, reason in peers.items() if reason]
    notes += [f"left out, as no visit uses it: {line}" for line in left]
    return f"{count} modules", problems, notes


def _peer(backend) -> str | None:
    import torch

    try:
        return backend.unavailable(torch.device("cuda"))
    except Exception as error:  # it asks the GPU
        return f"cannot be asked without a GPU: {type(error).__name__}: {str(error).splitlines()[0]}"


def modules() -> list[str]:
    """Everything of ours that is a module, but for tests outside tests/gpu and what is run only as a script."""
    found = []
    for package, folder in (
        ("airl_kernels", ROOT / "kernels/airl_kernels"),
        ("airl_fast", ROOT / "airl_fast"),
        ("bench", ROOT / "bench"),
        ("tests.gpu", ROOT / "tests/gpu"),
    ):
        found += [info.name for info in pkgutil.walk_packages([str(folder)], f"{package}.")]
    return sorted(n for n in found if not n.endswith(("__main__", "._native")) and not n.startswith("bench.test_"))


def check_private(jobs: int):
    from bench.private_api import LISTED, problems

    return f"{len(LISTED)} entries", problems(), []


def check_kernels(jobs: int):
    """In a process of its own: its pool parts from a process that has imported little."""
    CARRIED.mkdir(exist_ok=True)
    command = ["--arch", "90", "--jobs", str(jobs), "--json", str(RECORDED)]
    code, lines = _stream([sys.executable, "-m", "bench.precompile", *command])
    problems = [line for line in lines if line.startswith(("FAILED", "BROKEN"))]
    if code and not problems:
        problems = [f"bench.precompile ended with code {code}: {' '.join(lines[-3:])}"]
    done = next((line for line in reversed(lines) if line.startswith("sm_90:")), "")
    return done, problems, [f"the list of kernels is in {RECORDED.relative_to(ROOT)}"]


def check_rehearsal(jobs: int):
    with tempfile.TemporaryDirectory() as folder:
        code, lines = _stream([sys.executable, "-m", "bench.gpu_check", folder, "--rehearse"])
    problems = [f"bench.gpu_check ended with code {code}: {' | '.join(lines[-3:])}"] if code else []
    return f"{len(lines)} lines of output", problems, []


def _stream(command: Sequence[str]) -> tuple[int, list[str]]:
    """Exit code and lines of a command that prints as it goes."""
    lines = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode, [line for line in lines if line]


CHECKS = {
    "environment": check_environment,
    "imports": check_imports,
    "private": check_private,
    "kernels": check_kernels,
    "rehearsal": check_rehearsal,
}

if __name__ == "__main__":
    sys.exit(main())

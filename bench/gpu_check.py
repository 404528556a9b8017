"""Test the ops on this machine's GPU, measure them, and say which goals they reached, in one command of 8 minutes.

    make gpu-check OUT=dir          or      PYTHONPATH=kernels:. python3 -m bench.gpu_check dir
    python -m bench.gpu_check dir --rehearse        the same on a CPU at toy shapes

Needs one NVIDIA GPU, torch, triton and numpy; what else is installed, or laid out by `python -m bench.carry`, takes
part. Neither the project nor a virtual environment has to be installed. The stages (`bench/visit/plan.py`) run one
after the other, each within its own limit; one that fails or overruns does not stop the next. Writes into `dir`:

    results.jsonl       every result as soon as it is there (`bench/visit/records.py`)
    log.txt             what the stages printed
    summary.md          the goals and tables, written anew after every stage
    trace.json.gz       a profile of the two ops furthest from their goal
    chunk_sweep.json    what the size of a chunk of logits costs

Exit code 0; 1 when a test fails, an op answers wrongly, or a stage did not end; 2 when nothing could be run; 143 after
SIGTERM, which stops the stage under way and still leaves a summary. A missed goal is shown and changes nothing.
docs/benchmarks.md says how to publish the folder.
"""

import argparse
import importlib.util
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import carry
from bench.errors import BadArgument, Parser, run_command
from bench.results import commit, device_name
from bench.tied import exit_on_signal
from bench.visit.plan import STAGES, WHOLE, WHOLE_REHEARSAL, Stage, Visit
from bench.visit.records import append
from bench.visit.runner import ROOT, run
from bench.visit.summary import exit_code, render

NEEDED = ("torch", "triton", "numpy")
LEAST = 5.0  # with less time than this left no stage is begun


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("gpu-check", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    summary = __doc__.split("\n\n")[0]
    parser: argparse.ArgumentParser = Parser(prog="python -m bench.gpu_check", description=summary)
    parser.add_argument("out", type=Path, help="folder for the results; made if absent")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, at toy shapes")
    parser.add_argument("--stages", help=f"comma-separated, of {', '.join(s.name for s in STAGES)} (default: all)")
    parser.add_argument("--whole-s", type=float, help=f"seconds for everything (default: {WHOLE:.0f})")
    options = parser.parse_args(arguments)
    stages = _chosen(options.stages)
    if options.whole_s is not None and not 0 < options.whole_s < math.inf:
        raise BadArgument(f"--whole-s {options.whole_s:g}: give the seconds for everything, more than 0.")
    visit = Visit(out=options.out.resolve(), rehearse=options.rehearse)
    environment = describe(visit)
    try:
        visit.out.mkdir(parents=True, exist_ok=True)
        for stale in ("results.jsonl", "log.txt", "summary.md", "trace.json.gz", "chunk_sweep.json"):
            (visit.out / stale).unlink(missing_ok=True)
        planned = [stage.name for stage in stages]
        append(visit.records, "environment", "environment", **environment, stages=planned)
    except OSError as error:
        raise BadArgument(f"{options.out} cannot be written ({error.strerror}); give another folder.") from None
    if carry.FOLDER.is_dir() and carry.path_of() is None:
        print(f"{carry.FOLDER.name} is for Python {'.'.join(map(str, carry.PYTHON))} and left out", flush=True)
    with exit_on_signal():
        return check(visit, stages, options.whole_s or (WHOLE_REHEARSAL if visit.rehearse else WHOLE))


def _chosen(text: str | None) -> tuple[Stage, ...]:
    if text is None:
        return STAGES
    by_name = {stage.name: stage for stage in STAGES}
    for name in text.split(","):
        if name not in by_name:
            raise BadArgument(f"--stages {name}: give some of {', '.join(by_name)}.")
    return tuple(by_name[name] for name in text.split(","))


def describe(visit: Visit) -> dict[str, object]:
    """Device and versions. Raises BadArgument where nothing could be run."""
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            raise BadArgument(f"the package {name} is missing; install it for {sys.executable}.")
    import torch
    import triton

    carried = carry.path_of()
    common = {
        "commit": commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "cores": os.cpu_count(),
        "carried": [] if carried is None else sorted(p.name for p in carried.glob("*.dist-info")),
    }
    if visit.rehearse:
        return {"device": f"{platform.machine()} CPU, a rehearsal at toy shapes", "rehearsal": True} | common
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees none"
        raise BadArgument(
            f"no NVIDIA GPU: {built}; run it on a machine with a GPU and a CUDA build of torch, or try it with "
            "--rehearse."
        )
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": device_name(torch.device("cuda", 0)),  # as every row names it
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
    } | common


def check(visit: Visit, stages: Sequence[Stage], whole: float) -> int:
    """Every stage in its order, whatever became of the ones before; the summary is written after each, and at the end
    whatever ends it."""
    start = time.monotonic()
    environment = stage_environment(visit)
    try:
        for number, stage in enumerate(stages):
            left = whole - (time.monotonic() - start)
            limit = _limit(stage, stages[number + 1 :], left, visit)
            reason = stage.absent(visit) or (f"{left:.0f} s are left" if left < LEAST else None)
            if reason is not None:
                append(visit.records, stage.name, "end", skipped=reason)
                print(f"=== {stage.name} is left out: {reason}", flush=True)
                continue
            print(f"=== {stage.name}, at most {limit:.0f} s", flush=True)
            append(visit.records, stage.name, "begin", limit=round(limit, 1), at=round(time.monotonic() - start, 1))
            ran = run(stage.command(visit, limit), visit.out / "log.txt", limit, environment)
            append(visit.records, stage.name, "end", code=ran.code, seconds=round(ran.seconds, 1))
            _summarise(visit)
    finally:
        text = _summarise(visit)
    print("\n" + text, end="", flush=True)
    return exit_code(visit.records)


def _summarise(visit: Visit) -> str:
    text = render(visit.records)
    (visit.out / "summary.md").write_text(text, encoding="utf-8")
    return text


def _limit(stage: Stage, later: Sequence[Stage], left: float, visit: Visit) -> float:
    """An elastic stage may use what the later ones do not need."""
    own = stage.limit(visit)
    if stage.elastic and not visit.rehearse:
        own = max(own, left - sum(s.limit(visit) for s in later if s.absent(visit) is None))
    return min(own, left)


def stage_environment(visit: Visit) -> dict[str, str]:
    """Sources and carried packages are found where they lie; children say what they print at once."""
    paths = [ROOT / "kernels", ROOT, *filter(None, [carry.path_of()])]
    given = os.environ.get("PYTHONPATH")
    # Two threads a process of torch's own: most stages have many processes, none has work for the host's arithmetic.
    toy = {"AIRL_GPU_TESTS_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([given] if given else [])]),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "2",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "AIRL_COMMIT": commit(),
        **(toy if visit.rehearse else {}),
    }


if __name__ == "__main__":
    sys.exit(main())

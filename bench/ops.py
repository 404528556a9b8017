"""Verify, then time the ops of airl_kernels and their peers, against floors measured in the same run.

    python -m bench.ops                                     all ops, at small shapes on a CPU, large ones on a GPU
    python -m bench.ops --ops linear_ppo_loss --shapes linear:4096x3584x152064
    python -m bench.ops --json new.json --compare old.json --plot new.png

Exit code 0; 1 when one of ours is wrong or fails; 2 for bad arguments. docs/benchmarks.md explains the columns.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.cases import OPS, Backend
from bench.errors import BadArgument, Parser, run_command
from bench.measure import Settings, problems, run_all
from bench.peers import BACKENDS, airl
from bench.report import absences, changes_table, plot, results_table
from bench.results import SCHEMA, Document, Row, commit, compare, device_name, read_rows, versions
from bench.shapes import load_shapes

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench.ops", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    options = _parser().parse_args(arguments)
    before = None if options.compare is None else read_rows(Path(options.compare))
    document = measure_ops(
        shapes=options.shapes, ops=options.ops, backends=options.backends, device=options.device,
        dtype=options.dtype, budget=options.budget_s, save_to=Path(options.json) if options.json else None,
    )  # fmt: skip
    print(render(document))
    if before is not None:
        changes = compare(before, document.rows)
        print(
            f"\nagainst {options.compare}, {sum(change.slower for change in changes)} of {len(changes)} rows slower:\n"
        )
        print(changes_table(changes) if changes else "no row of it was measured again on this device.")
    if options.plot:
        plot(document.rows, Path(options.plot), f"{document.header['device']}, commit {document.header['commit']}")
    return exit_code(document)


def _parser() -> Parser:
    parser = Parser(prog="python -m bench.ops", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", help="cpu, gpu, a JSON file with a list of names, or names (default: by device)")
    parser.add_argument("--ops", help=f"comma-separated, of {', '.join(OPS)} (default: all)")
    parser.add_argument("--backends", help=f"comma-separated, of {', '.join(b.NAME for b in BACKENDS)} (default: all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=tuple(_DTYPES), help="default: bfloat16 on CUDA, float32 on the CPU")
    parser.add_argument(
        "--budget-s", type=float, help="add no more rows after this many seconds; names what is left out"
    )
    parser.add_argument("--json", metavar="OUT.json", help="write the results")
    parser.add_argument("--compare", metavar="BASE.json", help="print the change against an earlier --json")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the percentages of the floor")
    return parser


def measure_ops(
    *,
    shapes: str | None = None,
    ops: str | None = None,
    backends: str | None = None,
    device: str = "auto",
    dtype: str | None = None,
    budget: float | None = None,
    seconds: float = 0.25,
    save_to: Path | None = None,
) -> Document:
    """The benchmark without its printing; the arguments are those of the command, as text.

    budget: seconds for everything. seconds: of timing per row, about. save_to: the JSON file, written after every
    problem, so that a run that is stopped leaves what it has.
    """
    start = time.monotonic()
    if budget is not None and not budget > 0:
        raise BadArgument(f"--budget-s {budget:g}: give a number of seconds above 0.")
    place = _device(device)
    chosen = _chosen_backends(backends)
    settings = Settings(
        device=place,
        device_name=device_name(place),
        commit=commit(),
        dtype=_DTYPES[dtype] if dtype else torch.bfloat16 if place.type == "cuda" else torch.float32,
        backends=chosen,
        budget=budget,
        seconds=seconds,
    )
    todo = problems(load_shapes(shapes or ("gpu" if place.type == "cuda" else "cpu")), _chosen_ops(ops))
    if not todo:
        raise BadArgument("--ops and --shapes have nothing in common; give shapes of the ops' families, or neither.")
    document = Document(header=_header(settings), rows=[], absent=[])
    for entry in run_all(todo, settings, lambda line: print(line, file=sys.stderr, flush=True)):
        (document.rows if isinstance(entry, Row) else document.absent).append(entry)
        document.header["seconds"] = round(time.monotonic() - start, 1)
        if save_to is not None and isinstance(entry, Row) and entry.backend == airl.NAME:  # once per problem
            document.write(save_to)
    if save_to is not None:
        document.write(save_to)
    return document


def _header(settings: Settings) -> dict[str, object]:
    return {
        "schema": SCHEMA,
        "device": settings.device_name,
        "commit": settings.commit,
        "versions": versions(settings.backends),
        "threads": torch.get_num_threads(),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "budget_s": settings.budget,
        "seconds": 0.0,
    }


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise BadArgument("--device cuda: torch sees no CUDA device; leave it out to measure on the CPU.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _chosen_ops(text: str | None) -> tuple[str, ...]:
    chosen = tuple(OPS) if text is None else tuple(name.strip() for name in text.split(","))
    for name in chosen:
        if name not in OPS:
            raise BadArgument(f"--ops {name}: give some of {', '.join(OPS)}.")
    return chosen


def _chosen_backends(text: str | None) -> tuple[Backend, ...]:
    by_name = {backend.NAME: backend for backend in BACKENDS}
    if text is None:
        return BACKENDS
    for name in text.split(","):
        if name.strip() not in by_name:
            raise BadArgument(f"--backends {name.strip()}: give some of {', '.join(by_name)}.")
    names = [name.strip() for name in text.split(",")]
    return tuple(backend for backend in BACKENDS if backend.NAME in names)


def render(document: Document) -> str:
    header = document.header
    present = ", ".join(f"{name} {version}" for name, version in header["versions"].items() if version)
    parts = [
        f"{header['device']}; {present}; commit {header['commit']}",
        _floors(document.rows),
        results_table(document.rows) if document.rows else "no rows",
        absences(document),
        f"{len(document.rows)} rows in {header['seconds']:.0f} s",
    ]
    return "\n\n".join(part for part in parts if part)


def _floors(rows: Sequence[Row]) -> str:
    """The range of the rates that the floors were taken from."""
    parts = []
    for bound, unit in (("copy", "GB/s"), ("gemm", "TFLOP/s")):
        rates = [row.floor_rate for row in rows if row.bound == bound]
        if rates:
            parts.append(f"{bound} {min(rates):.3g} to {max(rates):.3g} {unit}")
    return f"floors, measured in turns with the rows: {', '.join(parts)}" if parts else ""


def exit_code(document: Document) -> int:
    """1 when one of ours is wrong or fails; peers are not ours to mend."""
    return int(any(entry.backend == airl.NAME for entry in document.of_kind("failed")))


if __name__ == "__main__":
    sys.exit(main())

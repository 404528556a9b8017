"""What the size of a chunk of logits costs in time and in memory: the measurement behind the default.

    python -m bench.chunk_sweep [--json OUT] [--budget-s 45] [--device cuda] [--shapes gpu] [--rows 1024,4096]

times `linear_ppo_loss` forward and backward with a trainable and a frozen weight at several `chunk_rows`, every size
in turn on the same inputs, and measures the most memory that a call holds. The JSON is written anew after every
shape, so that a run cut short leaves what it has. A new shape is not begun once the budget is spent.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import airl_kernels as ak
import torch

from bench.cases import CASES, Case, by_autograd
from bench.errors import BadArgument, Parser, run_command
from bench.inputs import CLIP, LinearInputs, make_inputs
from bench.memory import peak_mib
from bench.report import short, table
from bench.shapes import Shape, load_shapes
from bench.timing import measure

SHAPES = {
    "gpu": "linear:16384x3584x152064,linear:16384x896x151936",
    "cpu": "linear:64x16x2048",  # a toy: tries the command
}
ROWS = {"cuda": (16384, 8192, 4096, 2048, 1024), "cpu": (64, 32, 16)}
MODES = ("trainable f+b", "frozen f+b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """ms: median of `linear_ppo_loss` forward and backward. slower: over the fastest size of its shape and mode."""

    device: str
    shape: str
    mode: str
    chunk_rows: int
    chunk_mib: float
    ms: float
    slower_percent: float
    peak_mib: float


def sweep(shapes: Sequence[Shape], sizes: Sequence[int], device: torch.device, budget: float) -> Iterator[list[Point]]:
    """The points of one shape and mode after the other, until `budget` seconds are spent."""
    start = time.monotonic()
    for shape in shapes:
        for mode in MODES:
            if time.monotonic() - start < budget:
                yield _points(shape, mode, sizes, device)


def _points(shape: Shape, mode: str, sizes: Sequence[int], device: torch.device) -> list[Point]:
    (case,) = (case for case in CASES if (case.op, case.mode) == ("linear_ppo_loss", mode))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = make_inputs(case, shape, dtype, device)
    sizes = [size for size in sizes if size <= shape.tokens]
    runs = {str(size): _run(case, size, inputs) for size in sizes}
    times = {name: timing.median for name, timing in measure(runs, device, seconds=0.4, most=20).items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return [
        Point(
            device=name,
            shape=shape.name,
            mode=mode,
            chunk_rows=size,
            chunk_mib=size * shape.size("vocabulary") * dtype.itemsize / (1 << 20),
            ms=times[str(size)],
            slower_percent=100 * (times[str(size)] / min(times.values()) - 1),
            peak_mib=peak_mib(lambda run=runs[str(size)]: run(0), device),
        )
        for size in sizes
    ]


def _run(case: Case, chunk_rows: int, inputs: LinearInputs):
    def loss(inputs: LinearInputs) -> torch.Tensor:
        return ak.linear_ppo_loss(
            inputs.hidden, inputs.weight, inputs.targets, inputs.old_logprobs, inputs.advantages, inputs.mask,
            clip_low=CLIP, clip_high=CLIP, denominator=inputs.denominator, entropy=False, chunk_rows=chunk_rows,
        )[0]  # fmt: skip

    run = by_autograd(case, loss)
    return lambda _: run(inputs)


def render(points: Sequence[Point]) -> str:
    header = ("shape", "mode", "chunk rows", "chunk MiB", "ms", "slower", "peak MiB")
    return table(
        header,
        [
            (
                p.shape,
                p.mode,
                str(p.chunk_rows),
                f"{p.chunk_mib:.0f}",
                short(p.ms),
                f"{p.slower_percent:.1f}%",
                f"{p.peak_mib:.0f}",
            )
            for p in points
        ],
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench.chunk_sweep", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.chunk_sweep", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the points here, anew after every shape")
    parser.add_argument("--budget-s", type=float, default=45.0, help="seconds after which no shape is begun")
    parser.add_argument("--device", choices=tuple(ROWS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", help="linear shapes as for bench.ops; default: gpu's, or a toy on the CPU")
    parser.add_argument("--rows", help="sizes to try, divided by commas")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise BadArgument("--device cuda: torch sees no CUDA device; leave it out to try the command on the CPU.")
    text = options.shapes or ("gpu" if options.device == "cuda" else "cpu")
    shapes = load_shapes(SHAPES.get(text, text))
    if any(shape.family != "linear" for shape in shapes):
        raise BadArgument(f"--shapes {text}: give shapes of the form linear:TOKENSxHIDDENxVOCABULARY.")
    try:
        sizes = [int(size) for size in options.rows.split(",")] if options.rows else list(ROWS[options.device])
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise BadArgument(f"--rows {options.rows}: give whole numbers above 0, divided by commas.")
    points: list[Point] = []
    for found in sweep(shapes, sizes, torch.device(options.device), options.budget_s):
        points += found
        if options.json:
            options.json.write_text(json.dumps([asdict(point) for point in points], indent=1), encoding="utf-8")
        print(render(found), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

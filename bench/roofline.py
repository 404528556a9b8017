"""What the ops should take on GPUs, from bytes, operations and datasheet rates. A prediction, not a measurement.

    python -m bench.roofline [--chips A100,H200] [--shapes gpu] [--ops linear_logprob] [--json OUT.json]

floor: the op's products at the chip's dense bf16 rate, or its bytes at the chip's bandwidth (`costs.py`).
predicted: the floor and the bytes that the row kernels move between the products, nothing overlapping. What it
leaves out makes real times longer: products reach perhaps 70 to 90% of the datasheet's rate, copies about 90%.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cases import OPS
from bench.costs import Cost, cost_of
from bench.errors import BadArgument, Parser, run_command
from bench.measure import problems
from bench.report import short, table
from bench.shapes import load_shapes

LABEL = "prediction from datasheet rates, not a measurement"
BF16 = 2  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """Datasheet rates. bandwidth: GB/s (10^9 bytes). tflops: TFLOP/s, bf16 tensor cores, dense."""

    name: str
    bandwidth: float
    tflops: float
    source: str


CHIPS = {
    "A100": Chip(
        name="A100-80GB SXM", bandwidth=2039.0, tflops=312.0, source="NVIDIA A100 Tensor Core GPU datasheet, 2022"
    ),
    # The datasheets state the rate with sparsity, 1,979; dense is half.
    "H100": Chip(name="H100 SXM", bandwidth=3350.0, tflops=989.5, source="NVIDIA H100 Tensor Core GPU datasheet, 2023"),
    "H200": Chip(name="H200 SXM", bandwidth=4800.0, tflops=989.5, source="NVIDIA H200 Tensor Core GPU datasheet, 2024"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """floor_ms, predicted_ms: milliseconds. percent_of_floor: 100·floor/predicted, the most our design can reach."""

    label: str
    chip: str
    op: str
    mode: str
    shape: str
    bound: str
    bytes: int
    flops: int
    row_bytes: int
    floor_ms: float
    predicted_ms: float
    percent_of_floor: float


def times_ms(cost: Cost, chip: Chip) -> tuple[float, float]:
    """(floor, predicted)."""
    floor = cost.flops / chip.tflops / 1e9 if cost.bound == "gemm" else cost.bytes / chip.bandwidth / 1e6
    return floor, floor + cost.row_bytes / chip.bandwidth / 1e6


def predict(shapes: str, ops: Sequence[str], chips: Sequence[str]) -> list[Prediction]:
    predictions = []
    for problem in problems(load_shapes(shapes), ops):
        cost = cost_of(problem.case, problem.shape, BF16)
        for name in chips:
            floor, predicted = times_ms(cost, CHIPS[name])
            predictions.append(
                Prediction(
                    label=LABEL, chip=CHIPS[name].name, op=problem.case.op, mode=problem.case.mode,
                    shape=problem.shape.name, bound=cost.bound, bytes=cost.bytes, flops=cost.flops,
                    row_bytes=cost.row_bytes, floor_ms=floor, predicted_ms=predicted,
                    percent_of_floor=100 * floor / predicted,
                )
            )  # fmt: skip
    return predictions


def render(predictions: Sequence[Prediction], chips: Sequence[str]) -> str:
    """One line per op and shape; per chip the floor and the prediction."""
    header = ["op", "mode", "shape", "bound"]
    for name in chips:
        header += [f"{name} floor ms", "predicted ms"]
    lines = []
    for start in range(0, len(predictions), len(chips)):
        first, *_ = group = predictions[start : start + len(chips)]
        times = (short(value) for entry in group for value in (entry.floor_ms, entry.predicted_ms))
        lines.append([first.op, first.mode, first.shape, first.bound, *times])
    rates = "; ".join(
        f"{CHIPS[name].name} {CHIPS[name].bandwidth:g} GB/s, {CHIPS[name].tflops:g} TFLOP/s" for name in chips
    )
    return f"{LABEL.upper()}. bf16 in, {rates}.\n\n{table(header, lines)}"


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command("bench.roofline", _main, arguments)


def _main(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m bench.roofline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--shapes", default="gpu", help="cpu, gpu, a JSON file, or names (default: gpu)")
    parser.add_argument("--ops", default=",".join(OPS), help="comma-separated (default: all)")
    parser.add_argument("--json", metavar="OUT.json", help="write the predictions")
    options = parser.parse_args(arguments)
    chips, ops = options.chips.split(","), options.ops.split(",")
    for flag, names, known in (("--chips", chips, tuple(CHIPS)), ("--ops", ops, OPS)):
        for name in names:
            if name not in known:
                raise BadArgument(f"{flag} {name}: give some of {', '.join(known)}.")
    predictions = predict(options.shapes, ops, chips)
    if options.json:
        _write(Path(options.json), predictions, chips)
    print(render(predictions, chips))
    return 0


def _write(path: Path, predictions: Sequence[Prediction], chips: Sequence[str]) -> None:
    value = {
        "label": LABEL,
        "chips": [asdict(CHIPS[name]) for name in chips],
        "rows": [asdict(entry) for entry in predictions],
    }
    try:
        path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise BadArgument(f"--json {path}: cannot be written ({error.strerror}).") from None


if __name__ == "__main__":
    sys.exit(main())

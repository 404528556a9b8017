"""Where the two ops furthest from their goal spend their time: kernels, a trace, and counters where ncu is there.

python -m bench.visit.profile --records FILE --trace trace.json.gz [--device cpu] [--most 2]
"""

import argparse
import csv
import gzip
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.cases import CASES
from bench.inputs import make_inputs
from bench.peers import airl
from bench.results import Row
from bench.shapes import parse_shape
from bench.targets import judge
from bench.tied import tied
from bench.timing import synchronize
from bench.visit.records import append, of, read

STAGE = "profile"
CALLS, MOST_KERNELS, MOST_TRACE = 3, 20, 15 << 20
LEAST_COUNTING = 8.0  # with fewer seconds ncu is not begun
COUNTERS = {
    "gpu__time_duration.sum": "ns",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy %",
    "launch__registers_per_thread": "registers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.visit.profile")
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=60.0)
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument("--once", nargs=3, metavar=("OP", "MODE", "SHAPE"), help="run one call, for ncu")
    options = parser.parse_args(arguments)
    device, until = torch.device(options.device), time.monotonic() + options.budget_s
    if options.once:
        _call_of(*options.once, device)()
        synchronize(device)
        return 0
    chosen = furthest(read(options.records), options.most)
    if not chosen:
        print("no row of ours was measured: nothing to profile")
        return 0
    _profile(chosen, device, options.records, options.trace)
    if device.type == "cuda" and shutil.which("ncu"):
        for row in chosen:
            if until - time.monotonic() > LEAST_COUNTING:
                _counters(row, options.records, until - time.monotonic())
    return 0


def furthest(records: list[dict], most: int) -> list[Row]:
    """Our rows with the smallest share of their target, one an op; of the headline, else of the whole benchmark."""
    for stage in ("headline", "benchmark"):
        rows = [Row(**r["row"]) for r in of(records, stage, "row")]
        verdicts = sorted((v for v in judge(rows) if v.share is not None), key=lambda v: v.share)
        by_op = {v.row.op: v.row for v in reversed(verdicts)}  # the last written is the smallest
        found = [v.row for v in verdicts if by_op[v.row.op] is v.row][:most]
        if found:
            return found
    return []


def _call_of(op: str, mode: str, name: str, device: torch.device):
    shape = parse_shape(name)
    case = next(c for c in CASES if (c.op, c.mode) == (op, mode) and c.runs_at(shape))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs, run = make_inputs(case, shape, dtype, device), airl.prepare(case, shape)
    return lambda: run(inputs)


def _profile(rows: Sequence[Row], device: torch.device, records: Path, trace: Path | None) -> None:
    calls = {f"{row.op} {row.mode} {row.shape}": _call_of(row.op, row.mode, row.shape, device) for row in rows}
    for call in calls.values():  # compiles
        call()
    synchronize(device)
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as profiled:
        for name, call in calls.items():
            for _ in range(CALLS):
                with record_function(f"call {name}"):
                    call()
                    synchronize(device)
    events = list(profiled.events())
    for name in calls:
        append(records, STAGE, "kernels", name=name, calls=CALLS, ms_by_kernel=_by_kernel(events, name, cuda))
    if trace is not None:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder) / "trace.json"
            profiled.export_chrome_trace(str(plain))
            packed = gzip.compress(plain.read_bytes())
        if len(packed) <= MOST_TRACE:
            trace.write_bytes(packed)
        print(f"trace of {len(packed) / 2**20:.1f} MiB{'' if len(packed) <= MOST_TRACE else ', too large, left out'}")


def _by_kernel(events: list, name: str, cuda: bool) -> dict[str, float]:
    """Milliseconds a call of each kernel (on the CPU, operator) that ran within the marked calls, longest first."""
    spans = [e.time_range for e in events if e.name == f"call {name}" and _on_cpu(e)]
    total: Counter[str] = Counter()
    for event in events:
        if _on_cpu(event) == cuda or event.name.startswith("call "):
            continue
        if any(s.start <= event.time_range.start <= s.end for s in spans):
            spent = event.time_range.elapsed_us() if cuda else event.self_cpu_time_total
            total[event.name] += spent / 1e3 / CALLS
    return {kernel[:120]: round(ms, 4) for kernel, ms in total.most_common(MOST_KERNELS)}


def _on_cpu(event) -> bool:
    return event.device_type == torch.autograd.DeviceType.CPU


def _counters(row: Row, records: Path, seconds: float) -> None:
    """Of our own kernels, whose names begin with an underscore; the products are cuBLAS's."""
    command = ["ncu", "--clock-control", "none", "--csv", "-k", "regex:^_", "--launch-count", "8"]
    command += ["--metrics", ",".join(COUNTERS), sys.executable, "-m", "bench.visit.profile", "--records", "none"]
    command += ["--once", row.op, row.mode, row.shape]
    found: dict[str, dict[str, str]] = {}
    try:
        ran = subprocess.run(tied(command), capture_output=True, text=True, check=False, timeout=seconds)
        found = counters_in(ran.stdout)
        error = None if found else (ran.stdout + ran.stderr)[-1000:]
    except subprocess.TimeoutExpired:
        error = f"ncu was stopped after {seconds:.0f} s"
    append(records, STAGE, "counters", name=f"{row.op} {row.mode} {row.shape}", kernels=found, error=error)
    print(found or error, flush=True)


def counters_in(text: str) -> dict[str, dict[str, str]]:
    """{launch and kernel: {label: value}} from what `ncu --csv` prints among other lines."""
    found: dict[str, dict[str, str]] = {}
    for entry in csv.DictReader(line for line in text.splitlines() if line.startswith('"')):
        label = COUNTERS.get(entry.get("Metric Name") or "")
        if label:
            kernel = f"{entry['ID']} {entry['Kernel Name'][:60]}"
            found.setdefault(kernel, {})[label] = entry["Metric Value"]
    return found


if __name__ == "__main__":
    sys.exit(main())

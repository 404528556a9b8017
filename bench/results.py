"""What a run leaves: rows, and what is missing with its reason. Written as JSON, read again for --compare."""

import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from bench.cases import Backend
from bench.errors import BadArgument

SCHEMA = 1
SLOWER = 1.10  # a row whose median grew beyond this is flagged


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One backend's measurement of one case at one shape.

    ms, ms_p20, ms_p80: milliseconds per call, median and quantiles over `samples` samples.
    bytes, flops: the least the op has to do (`costs.py`), the same for every backend; gb_per_s and tflop_per_s are
    these over the median. floor_ms: that work at floor_rate, GB/s of a copy or TFLOP/s of a product, as bound says,
    measured in turns with this row.
    percent_of_floor: 100·floor_ms/ms. peak_mib: memory beyond the inputs, gradients included;
    None on the CPU for calls of more than half a second, which the profiler would slow down much further.
    error, budget: of the verification (`verify.py`).
    ratio_to_peer: of our rows only, each peer's median over ours; above 1 we are faster.
    memory_ratio_to_peer: likewise of peak_mib; above 1 we need less.
    """

    device: str
    commit: str
    op: str
    mode: str
    shape: str
    dtype: str
    backend: str
    ms: float
    ms_p20: float
    ms_p80: float
    samples: int
    bytes: int
    gb_per_s: float
    flops: int
    tflop_per_s: float
    bound: str
    floor_rate: float
    floor_ms: float
    percent_of_floor: float
    peak_mib: float | None
    error: float
    budget: float
    ratio_to_peer: dict[str, float] = field(default_factory=dict)
    memory_ratio_to_peer: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows of different runs the same measurement."""
        return self.device, self.op, self.mode, self.shape, self.dtype, self.backend


@dataclass(frozen=True, slots=True, kw_only=True)
class Absent:
    """A row that is not there. kind: "skipped" (not applicable), "failed" (wrong, or raised), "left out" (no time)."""

    kind: str
    op: str
    mode: str
    shape: str
    backend: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """header: schema, device, versions of packages, commit, threads, seconds in all."""

    header: dict[str, object]
    rows: list[Row]
    absent: list[Absent]

    def of_kind(self, kind: str) -> list[Absent]:
        return [entry for entry in self.absent if entry.kind == kind]

    def write(self, path: Path) -> None:
        value = {**self.header, "rows": [asdict(row) for row in self.rows]}
        value["absent"] = [asdict(entry) for entry in self.absent]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise BadArgument(f"--json {path}: cannot be written ({error.strerror}).") from None


def read_rows(path: Path) -> list[Row]:
    """The rows of an earlier --json file."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return [Row(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadArgument(f"--compare {path}: is no result of `python -m bench.ops --json` ({error}).") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The same measurement before and now. ratio: time now over before."""

    before: Row
    now: Row

    @property
    def ratio(self) -> float:
        return self.now.ms / self.before.ms

    @property
    def slower(self) -> bool:
        return self.ratio > SLOWER


def compare(before: list[Row], now: list[Row]) -> list[Change]:
    earlier = {row.key: row for row in before}
    return [Change(before=earlier[row.key], now=row) for row in now if row.key in earlier]


def device_name(device: torch.device) -> str:
    """'NVIDIA H200', or the processor with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def commit() -> str:
    """Of this checkout, with "+" when its files differ from it; "unknown" outside git, where AIRL_COMMIT names it."""
    if given := os.environ.get("AIRL_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return run.stdout.strip()


def versions(backends: tuple[Backend, ...]) -> dict[str, str | None]:
    """Of torch, triton and every backend's package; None where it is absent."""
    from bench.peers._packages import installed

    found = {"torch": torch.__version__, "triton": installed("triton"), "cuda": torch.version.cuda}
    return found | {backend.NAME: backend.version() for backend in backends if backend.NAME not in ("torch eager",)}

"""Every number a run reports. The only place where training waits for the device to read a value.

Stages return records of 0-dim tensors; `Metrics.log` brings all of a step's to the host in one transfer and writes
them to metrics.jsonl, TensorBoard and, when asked, Weights & Biases.
"""

import dataclasses
import json
import math
import os
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import torch

from airl_fast.errors import UserError

GIB = 2**30
ETA_WINDOW = 20  # steps whose mean duration the remaining time is computed from


class Metrics:
    """Collects and writes the metrics of a run. Use as a context manager, or call `close`.

    path: the metrics.jsonl to append to. start_step: updates done before this process (on resume). logs: directory
    of TensorBoard files, None for none. wandb: also log to Weights & Biases, as run `run_name` with `config`.
    device: on "cuda", phases wait for the device, so that their seconds are those of their own work.
    """

    def __init__(
        self,
        path: Path,
        *,
        total_steps: int,
        start_step: int = 0,
        logs: Path | None = None,
        wandb: bool = False,
        run_name: str = "",
        config: Mapping[str, Any] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._path, self._total = path, total_steps
        self._wait = torch.device(device).type == "cuda"
        self._wandb = _start_wandb(run_name, config or {}) if wandb else None
        self._board = _open_board(logs, start_step + 1) if logs is not None else None
        try:
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}.") from None
        self._phases: dict[str, float] = {}
        self._durations: deque[float] = deque(maxlen=ETA_WINDOW)
        self._step_began = time.perf_counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds of the block to `seconds/NAME` of the step that the next `log` closes."""
        self._synchronize()
        began = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - began

    def log(self, step: int, *records: Any, tokens: int | None = None, **groups: Any) -> dict[str, float]:
        """Write one line for `step` (from 1) and return its values.

        records: frozen dataclasses or mappings of 0-dim tensors and numbers, nested freely; None fields are left
        out. A record passed by keyword has its name before its fields: `log(3, policy=stats)` gives `policy/loss`.
        tokens: tokens processed in the step, for `tokens_per_s`. Added by itself: `seconds/step`, `seconds/PHASE`,
        `eta_s` (from the mean of the last 20 steps), `peak_rss_gib` and on a GPU `peak_gpu_gib`. A value that is not
        finite is null in the file and NaN in the result. Raises ValueError for a name given twice, TypeError for
        a field that is not one number, UserError when the file cannot be written.
        """
        values = fetch(*records, **groups)
        now = time.perf_counter()
        elapsed, self._step_began = now - self._step_began, now
        self._durations.append(elapsed)
        values["seconds/step"] = elapsed
        values |= {f"seconds/{name}": seconds for name, seconds in self._phases.items()}
        self._phases.clear()
        if tokens is not None:
            values["tokens_per_s"] = tokens / elapsed
        values["eta_s"] = max(self._total - step, 0) * sum(self._durations) / len(self._durations)
        values["peak_rss_gib"] = peak_rss_gib()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            values["peak_gpu_gib"] = torch.cuda.max_memory_allocated() / GIB
        self._write(step, values)
        return values

    def flush(self) -> None:
        """Put every line on the disk. Call before a checkpoint, so that it never knows a step this file lacks."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(_write_failure(self._path, error)) from None
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        with suppress(OSError):  # every line was flushed when written; a line that failed has been reported
            self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        line = {"step": step} | {name: v if math.isfinite(v) else None for name, v in values.items()}
        try:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise UserError(_write_failure(self._path, error)) from None
        finite = {name: v for name, v in values.items() if math.isfinite(v)}
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def _synchronize(self) -> None:
        if self._wait:
            torch.cuda.synchronize()


def fetch(*records: Any, **groups: Any) -> dict[str, float]:
    """The fields of the records as Python numbers, in order, with at most one device-to-host transfer per device.

    Integer and bool tensors give ints and bools as 0/1. Raises ValueError for a name given twice and TypeError for a
    field that is not one number.
    """
    found: dict[str, Any] = {}
    for prefix, record in (*(("", record) for record in records), *groups.items()):
        for name, value in _fields(record, prefix):
            if name in found:
                raise ValueError(f"the metric '{name}' is given twice; pass one record by keyword to prefix its names")
            found[name] = value
    by_device: dict[torch.device, list[str]] = {}
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            by_device.setdefault(value.device, []).append(name)
    for names in by_device.values():
        # float64 holds every float32 and every count below 2**53 exactly.
        stacked = torch.stack([found[name].detach().reshape(()).double() for name in names])
        for name, number in zip(names, stacked.tolist(), strict=True):
            found[name] = number if found[name].is_floating_point() else int(number)
    return {name: int(value) if isinstance(value, bool) else value for name, value in found.items()}


def _fields(record: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor or number) for each leaf; nested records join their names with '/'."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        items = [(field.name, getattr(record, field.name)) for field in dataclasses.fields(record)]
    elif isinstance(record, Mapping):
        items = list(record.items())
    elif hasattr(record, "_asdict"):  # a named tuple
        items = list(record._asdict().items())
    elif record is None:
        return
    elif name and (isinstance(record, (int, float)) or (isinstance(record, torch.Tensor) and record.numel() == 1)):
        yield name, record
        return
    else:
        shape = f" of shape {tuple(record.shape)}" if isinstance(record, torch.Tensor) else ""
        raise TypeError(f"the metric '{name}' is a {type(record).__name__}{shape}, not one number")
    for key, value in items:
        yield from _fields(value, f"{name}/{key}" if name else str(key))


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """The lines of a metrics.jsonl; a last line that is being written is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def peak_rss_gib() -> float:
    """The most memory this process ever held, in GiB."""
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def _write_failure(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written: {error.strerror}; free some space and continue with --resume auto."


def _open_board(logs: Path, first_step: int) -> Any:
    """A TensorBoard writer that hides, after a resume, the steps that are about to be repeated."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used

    try:
        return SummaryWriter(str(logs), purge_step=first_step if first_step > 1 else None)
    except OSError as error:
        raise UserError(_write_failure(logs, error)) from None


def _start_wandb(run_name: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError("wandb=true, but wandb is not installed; pip install wandb, or set wandb=false.") from None
    return wandb.init(project="airl-fast", name=run_name, config=dict(config))

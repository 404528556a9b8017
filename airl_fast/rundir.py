"""The directory of one run: what is in it, who may write to it, and how a run continues in it.

    runs/NAME/{config.yaml, env.json, metrics.jsonl, rollouts/, eval/, checkpoints/, logs/}

Steps are counted from 1 in every file: `step: 3` in metrics.jsonl, rollouts/step_000003.jsonl.gz and
checkpoints/step_3 all describe the state after three updates.
"""

import datetime
import fcntl
import gzip
import importlib.metadata
import io
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from airl_fast import checkpoint
from airl_fast.errors import UserError
from airl_fast.processor import processor

SUBDIRECTORIES = ("rollouts", "eval", "checkpoints", "logs")
PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "numpy", "peft", "bitsandbytes", "vllm")


@dataclass(frozen=True)
class RunDir:
    """An open run directory, locked against a second process until `close` or the process ends.

    resume_from: the checkpoint to load, None for a fresh start. start_step: the updates it has behind it.
    """

    path: Path
    resume_from: Path | None
    start_step: int
    _lock: IO[str]

    @classmethod
    def create(
        cls,
        root: str | Path,
        name: str,
        *,
        config: Mapping[str, Any],
        resume: str = "never",
        changeable: Collection[str] = (),
        device: str = "cpu",
        say: Callable[[str], None] = print,
    ) -> "RunDir":
        """Make `root/name`, or continue in it.

        config: the full configuration as plain values; saved as config.yaml. resume: "never" wants a new or empty
        directory; "auto" continues from the last good checkpoint there, and starts afresh where there is none;
        a path names a checkpoint (…/checkpoints/step_N) or a run directory, whose last good checkpoint is taken.
        changeable: dotted keys (or sections) that may differ from the run's saved config; any other difference is
        an error. say: prints warnings, such as the name of a damaged checkpoint. Raises UserError.
        """
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name) or set(name) == {"."}:
            raise UserError(f"--run-name '{name}': use letters, digits, '-', '_' and '.' only.")
        path = Path(root).expanduser() / name
        source = None if resume in ("never", "auto") else checkpoint.find(Path(resume).expanduser(), say=say)
        inside = source is not None and source.resolve().is_relative_to(path.resolve())
        used = path.is_dir() and any(entry.name != ".lock" for entry in path.iterdir())
        if used and resume != "auto" and not inside:
            raise UserError(
                f"{path} exists and is not empty; choose another --run-name, or continue that run with --resume auto."
            )
        lock = _take(path) if used else None
        if resume == "auto":
            source = checkpoint.latest(path / "checkpoints", say=say, required=False)
        if source is not None and (saved := source.parent.parent / "config.yaml").is_file():
            _compare(saved, config, changeable)
        # Nothing is made before this line, so that a refused start leaves nothing behind.
        try:
            for directory in (path, *(path / sub for sub in SUBDIRECTORIES)):
                directory.mkdir(parents=True, exist_ok=True)
            run = cls(path, source, checkpoint.step_of(source) if source is not None else 0, lock or _take(path))
            if used:
                run._rewind()
            write_atomically(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
            run._write_environment(device)
        except OSError as error:
            raise UserError(_unwritable(path, error)) from None
        return run

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def eval(self) -> Path:
        return self.path / "eval"

    def rollouts(self, step: int) -> Path:
        return self.path / "rollouts" / f"step_{step:06d}.jsonl.gz"

    def write_rollouts(self, step: int, traces: Iterable[Mapping[str, Any]]) -> Path:
        """The sampled traces of one step, one JSON object a line, gzipped. Equal traces give equal bytes."""
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, compresslevel=3) as packed:
            for trace in traces:
                packed.write((json.dumps(trace, ensure_ascii=False) + "\n").encode())
        path = self.rollouts(step)
        try:
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise UserError(_unwritable(path, error)) from None
        return path

    def close(self) -> None:
        """Let another process continue this run."""
        self._lock.close()

    def _rewind(self) -> None:
        """Forget what came after `start_step`, so that no line repeats and no file of another history stays."""
        truncate_metrics(self.metrics, self.start_step)
        for file in (self.path / "rollouts").glob("step_*.jsonl.gz"):
            if int(file.name.removeprefix("step_").removesuffix(".jsonl.gz")) > self.start_step:
                file.unlink()
        checkpoint.set_aside_after(self.checkpoints, self.start_step)

    def _write_environment(self, device: str) -> None:
        """Append this start to env.json: {"starts": [{time, argv, versions, …}, …]}."""
        path = self.path / "env.json"
        try:
            starts = json.loads(path.read_text())["starts"]
        except (OSError, ValueError, KeyError, TypeError):
            starts = []
        starts.append({**environment(device), "start_step": self.start_step})
        write_atomically(path, json.dumps({"starts": starts}, indent=2) + "\n")


def read_rollouts(path: Path) -> Iterator[dict[str, Any]]:
    """The traces that `write_rollouts` wrote."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def truncate_metrics(path: Path, step: int) -> None:
    """Keep the lines of steps up to `step`, and drop a last line that a crash cut short."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` so that a reader, or a crash, sees the old content or the new and never a part of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def environment(device: str) -> dict[str, Any]:
    """What a reader needs to repeat the run: command, code, versions, machine."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "argv": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in PACKAGES},
        "git_commit": git_commit(Path(__file__).parent),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "processor": processor(torch),
        "torch_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "process": os.getpid(),
    }


def version(package: str) -> str | None:
    """The installed version, without importing the package; None when it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(directory: Path) -> str | None:
    """The commit of the checkout that tracks `directory`, with '+changes' when files differ; None outside git."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(directory), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:  # an installed copy may lie inside somebody else's checkout, which does not track it
        git("ls-files", "--error-unmatch", ".")
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _take(path: Path) -> IO[str]:
    """Lock the run directory for this process. The system releases the lock when the process ends, however it ends."""
    try:
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise UserError(_unwritable(path, error)) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{path} is in use by another process; wait for it or choose another --run-name.") from None
    except OSError:  # a file system without locks (some NFS): run without this protection
        pass
    return lock


def _unwritable(path: Path, error: OSError) -> str:
    return f"{path}: cannot be written: {error.strerror}; free space or rights there, or choose another output_dir."


def _compare(saved: Path, config: Mapping[str, Any], changeable: Collection[str]) -> None:
    """Raise UserError naming the first key in which the saved config and the new one differ."""
    try:
        old = yaml.safe_load(saved.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        raise UserError(f"{saved}: cannot be read, so the run cannot be continued; start a new --run-name.") from None
    for key, before, now in _differences(old, _as_saved(config)):
        if any(key == c or key.startswith(c + ".") for c in changeable):
            continue
        raise UserError(
            f"{saved}: this run has {key}={before} and cannot continue with {key}={now}; "
            f"drop that change, or choose another --run-name."
        )


def _as_saved(config: Mapping[str, Any]) -> Any:
    """The config as it reads back from YAML, so that 1e-4 and tuples compare equal to themselves."""
    return yaml.safe_load(yaml.safe_dump(dict(config)))


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(dotted key, old value, new value) for each difference; a key on one side only reads 'unset' on the other."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            if key not in old or key not in new:
                sides = [json.dumps(side[key]) if key in side else "unset" for side in (old, new)]
                yield f"{prefix}{key}", sides[0], sides[1]
            else:
                yield from _differences(old[key], new[key], f"{prefix}{key}.")
    elif old != new or type(old) is not type(new):
        yield prefix.removesuffix("."), json.dumps(old), json.dumps(new)

"""Checkpoints that a crash, a full disk or a flipped bit cannot turn into a wrong resume.

A checkpoint is a directory `step_N` of safetensors and JSON files with a manifest of their SHA-256 sums. It is
written under a temporary name, flushed to the disk and renamed, so `step_N` either is complete or does not exist.
Nothing is pickled. Steps count finished updates, from 1.
"""

import errno
import json
import math
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from airl_fast import manifest
from airl_fast.errors import UserError

MANIFEST = "manifest.json"
_SCRATCH = (".tmp_", ".old_", "abandoned_")  # directory names that are never resumed from; `save` deletes them


class NonFiniteError(UserError):
    """A tensor to be saved holds NaN or infinity. Nothing was written."""


# ---------------------------------------------------------------------------------------------- trees of tensors


def save_tree(tree: Any, stem: Path) -> None:
    """Write a nested value to `stem.json` (structure and scalars) and `stem.safetensors` (tensors).

    tree: dict, list, tuple, str, int, float, bool, None, torch tensors and numpy arrays, nested freely; dict keys may
    be any of the scalars. Everything comes back bit-exact from `load_tree`, tensors on the CPU; tensors that share
    storage come back as separate copies. Raises TypeError naming the path of any other value.
    """
    tensors: dict[str, torch.Tensor] = {}
    structure = _encode(tree, "", tensors)
    save_file(_separate(tensors), str(stem) + ".safetensors")
    Path(str(stem) + ".json").write_text(json.dumps(structure, allow_nan=False), encoding="utf-8")


def load_tree(stem: Path) -> Any:
    """The value that `save_tree` wrote at `stem`."""
    structure = json.loads(Path(str(stem) + ".json").read_text(encoding="utf-8"))
    return _decode(structure, load_file(str(stem) + ".safetensors"))


def _encode(value: Any, path: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for `value`. Scalars and lists are themselves; the rest is a one-key object that names its type."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, (torch.Tensor, np.ndarray)):
        kind = "tensor" if isinstance(value, torch.Tensor) else "array"
        name = f"{len(tensors)}:{path}"  # numbered, because paths of different keys may read alike (1 and "1")
        tensors[name] = value.detach() if kind == "tensor" else torch.from_numpy(np.ascontiguousarray(value))
        return {kind: name}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, path, {}), _encode(v, f"{path}/{k}", tensors)] for k, v in value.items()]}
    raise TypeError(f"{path or 'the value'}: a {type(value).__name__} cannot be stored in a checkpoint")


def _decode(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "float":
        return float(content)
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return tensors[content].numpy()
    if kind == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    if kind == "dict":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in content}
    raise ValueError(f"unknown node {kind!r}")


def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors on the CPU, contiguous, each alone in its storage, as safetensors demands."""
    seen: set[int] = set()
    separate = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise TypeError(f"{name}: a {tensor.layout} {tensor.dtype} tensor cannot be stored in a checkpoint")
        copy = tensor.cpu().contiguous()
        whole = copy.untyped_storage().nbytes() == copy.numel() * copy.element_size()
        if copy.data_ptr() in seen or not whole:
            copy = copy.clone()
        seen.add(copy.data_ptr())
        separate[name] = copy
    return separate


# ---------------------------------------------------------------------------------------------- random states


def rng_state() -> dict[str, Any]:
    """The states of every global random generator, as a tree for `save`."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned. GPU states are restored for the GPUs that exist here."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available():
        for device, cuda_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(cuda_state, device)


# ---------------------------------------------------------------------------------------------- writing


def save(
    directory: Path,
    step: int,
    parts: Mapping[str, Any],
    *,
    writers: Mapping[str, Callable[[Path], None]] | None = None,
    keep: int = 2,
    may_be_nonfinite: Collection[str] = (),
) -> Path:
    """Write `directory/step_N` and then delete all but the newest `keep` checkpoints. Returns its path.

    parts: name -> tree (see `save_tree`). writers: name -> function that writes safetensors and JSON files into the
    directory it is given, for example `model.save_pretrained`. may_be_nonfinite: parts in which NaN is legitimate,
    such as a replay buffer. Raises NonFiniteError, or UserError when the disk is full or gone; in both cases what
    was there before is untouched.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: at least one checkpoint must stay")
    final = directory / f"step_{step}"
    temporary = directory / f".tmp_step_{step}"
    try:
        _delete_scratch(directory)
        temporary.mkdir()
        for name, tree in parts.items():
            save_tree(tree, temporary / name)
        for name, write in (writers or {}).items():
            (temporary / name).mkdir()
            write(temporary / name)
        _refuse_nonfinite(temporary, final.name, may_be_nonfinite)
        manifest.write(temporary, MANIFEST, step=step)
        if final.exists():
            final.rename(directory / f".old_step_{step}")
        temporary.rename(final)
        manifest.sync(directory)
    except (OSError, SafetensorError) as error:
        raise UserError(_write_failure(final, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _delete_scratch(directory)
    for old in steps(directory)[:-keep]:
        _delete(directory / f"step_{old}")
    return final


def _refuse_nonfinite(directory: Path, name: str, allowed: Collection[str]) -> None:
    """Check what is on the disk, so that it does not matter who wrote it."""
    for path in sorted(directory.rglob("*.safetensors")):
        part = path.relative_to(directory).with_suffix("").parts[0]
        if part in allowed:
            continue
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()  # the handle itself cannot be iterated
            for key in names:
                tensor = tensors.get_tensor(key)
                if not tensor.is_floating_point():
                    continue
                if tensor.itemsize == 1:  # torch has no isfinite for float8
                    tensor = tensor.float()
                if not torch.isfinite(tensor).all():
                    label = f"{part} {key.partition(':')[2].strip('/') if ':' in key else key}".strip()
                    raise NonFiniteError(
                        f"{name} was not saved because {label} holds NaN or infinity; the last good checkpoint "
                        f"is untouched, so lower the learning rate and continue with --resume auto."
                    )


def _write_failure(path: Path, error: Exception) -> str:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    what_to_do = "free some space" if full else "check that the directory exists and can be written"
    kept = steps(path.parent)
    good = f"step_{kept[-1]} is untouched" if kept else "there is no earlier one"
    return f"{path}: the checkpoint could not be written ({reason}); {good}; {what_to_do} and use --resume auto."


def _delete(path: Path) -> None:
    """Rename first: a deletion cut short must not leave a half-empty `step_N`."""
    doomed = path.with_name(f".old_{path.name.lstrip('.')}")
    if path != doomed:
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _delete_scratch(directory: Path) -> None:
    for path in directory.iterdir():
        if path.name.startswith(_SCRATCH):
            shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- reading


def steps(directory: Path) -> list[int]:
    """The steps that have a checkpoint in `directory`, ascending; damaged ones included."""
    names = (p.name for p in directory.iterdir()) if directory.is_dir() else ()
    return sorted(int(n.removeprefix("step_")) for n in names if re.fullmatch(r"step_\d+", n))


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def verify(path: Path) -> str | None:
    """What is wrong with the checkpoint, in a few words; None when every file is as it was written."""
    return manifest.problem(path, MANIFEST, step=step_of(path))


def latest(directory: Path, *, say: Callable[[str], None] = print, required: bool = True) -> Path | None:
    """The newest checkpoint in `directory` that is intact; damaged ones are named through `say` and passed over.

    With required=False an empty directory gives None. Raises UserError when there are only damaged checkpoints.
    """
    found = steps(directory)
    for step in reversed(found):
        path = directory / f"step_{step}"
        problem = verify(path)
        if problem is None:
            return path
        say(f"warning: {path} is damaged ({problem}); trying the one before it.")
    if not found and not required:
        return None
    what = "every checkpoint is damaged" if found else "there is no checkpoint"
    raise UserError(f"{directory}: {what}; start again with another --run-name.")


def find(path: Path, *, say: Callable[[str], None] = print) -> Path:
    """The checkpoint that `--resume PATH` means: a `step_N` directory, a run directory or its checkpoints directory."""
    if re.fullmatch(r"step_\d+", path.name) and path.is_dir():
        problem = verify(path)
        if problem is not None:
            raise UserError(f"{path} is damaged ({problem}); give another checkpoint.")
        return path
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    if not directory.is_dir():
        raise UserError(f"--resume {path}: there is no such directory; give a run or one of its checkpoints/step_N.")
    return latest(directory, say=say)  # type: ignore[return-value] -- required=True never gives None


def load(path: Path, part: str) -> Any:
    """One part of a checkpoint that `latest` or `find` returned. Raises UserError when it has no such part."""
    if not (path / f"{part}.json").is_file():
        raise UserError(f"{path} holds no '{part}'; it was written by another version or another preset.")
    return load_tree(path / part)


def set_aside_after(directory: Path, step: int) -> None:
    """Rename checkpoints later than `step`: a run that goes back must not later resume from the future it left.

    They stay as `abandoned_step_N` until the next checkpoint is written.
    """
    for later in (s for s in steps(directory) if s > step):
        target = directory / f"abandoned_step_{later}"
        shutil.rmtree(target, ignore_errors=True)
        (directory / f"step_{later}").rename(target)


# ---------------------------------------------------------------------------------------------- signals


class SignalGuard:
    """Turns SIGTERM and SIGINT into a flag that the loop reads between phases; a second signal ends at once.

    Use as a context manager around the loop. `stop` is the name of the signal received ("SIGTERM"), else None.
    Outside the main thread Python allows no handlers: the guard then does nothing.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.stop: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.stop is not None:
            if os.isatty(2):
                os.write(2, b"\x1b[?25h\n")  # the live panel hides the cursor
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.stop = signal.Signals(number).name
        note = f"\n{self.stop}: saving a checkpoint after this phase; send it again to stop at once.\n"
        os.write(2, note.encode())  # print() is not safe inside a signal handler

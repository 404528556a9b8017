"""A directory's files with their sizes and SHA-256 sums, so that a flipped bit is named and not used.

Checkpoints have such a list, and so have the model directories of a run. It finds damage, not forgery: whoever can
write the files can write the list.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from airl_fast.errors import UserError

MODEL = "airl_manifest.json"  # of a model directory; users' own hold a manifest.json of other makers now and then
_FORMAT = 1
_HARMLESS = ("README.md", "Thumbs.db", "desktop.ini")  # no loader reads them, nor a name that begins with a dot
_READ = (".safetensors", ".json", ".jinja", ".txt", ".model", ".py")  # what transformers reads of a model directory


def write(directory: Path, name: str, **facts: Any) -> None:
    """Flush every file of `directory` to the disk, then write their sums and `facts` to `name` there, and flush it."""
    files = _files(directory)
    for path in files:
        sync(path)
    _write(directory / name, directory, files, facts)
    for path in (*(p for p in directory.rglob("*") if p.is_dir()), directory):
        sync(path)


def problem(directory: Path, name: str, **facts: Any) -> str | None:
    """What is wrong with `directory` by its list `name`, in a few words; None when every file is as it was written and
    the list has these facts."""
    return _problem(directory / name, directory, facts)


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------- model directories


def write_beside(directory: Path) -> None:
    """The sums of the files that are read of a directory of the user's, beside `directory`, which links to it."""
    write_list(_beside(directory), directory)


def write_list(file: Path, directory: Path) -> None:
    """The same in a file of any name."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.suffix in _READ)
    _write(file, directory, files, {})


def check_list(file: Path, directory: Path) -> None:
    """UserError as `check_model` by a list that `write_list` wrote; without one, `directory` is taken as it is."""
    found = _problem(file, directory, {}) if file.is_file() else None
    if found is not None:
        raise UserError(_refusal(directory, found, file))


def has_model_list(directory: Path) -> bool:
    return (directory / MODEL).is_file() or _beside(directory).is_file()


def check_model(directory: Path) -> None:
    """UserError naming the file of a model directory that is missing, is not as it was written, or was added since: a
    second shard, an adapter or a template would be picked up by whoever reads the directory.

    A directory without a list, of a user's or of an older version, is taken as it is. The cost is one reading of the
    files, at the speed of SHA-256.
    """
    for file in (directory / MODEL, _beside(directory)):
        if not file.is_file():
            continue
        found = _problem(file, directory, {})
        if found is None and file.parent == directory:
            listed = json.loads(file.read_text(encoding="utf-8"))["files"]
            names = (path.relative_to(directory).as_posix() for path in _files(directory))
            added = [name for name in names if name not in listed and not _is_harmless(name)]
            found = f"{added[0]} was added to it" if added else None
        if found is not None:
            raise UserError(_refusal(directory, found, file))


def _refusal(directory: Path, found: str, file: Path) -> str:
    return (
        f"{directory} is not as it was written: {found}; restore it from a copy, or, if the change is your own, "
        f"delete {file}."
    )


def _beside(directory: Path) -> Path:
    return directory.parent / f"{directory.name}.{MODEL}"


def _is_harmless(name: str) -> bool:
    return name in _HARMLESS or name.startswith(".")


# ---------------------------------------------------------------------------------------------- lists


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MODEL)


def _write(file: Path, directory: Path, files: Iterable[Path], facts: dict[str, Any]) -> None:
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    file.write_text(json.dumps({"format": _FORMAT, **facts, "files": entries}, indent=1), encoding="utf-8")
    sync(file)


def _problem(file: Path, directory: Path, facts: dict[str, Any]) -> str | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            return f"{file.name} has format {content['format']} instead of {_FORMAT}"
        for name, entry in content["files"].items():
            path = directory / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} has changed since it was written"
        for fact, value in facts.items():
            if content[fact] != value:
                return f"{file.name} is that of {fact} {content[fact]}"
    except FileNotFoundError:
        return f"{file.name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{file.name} cannot be used ({type(error).__name__})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

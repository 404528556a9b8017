"""A directory's files with their sizes and SHA-256 sums, so that a flipped bit is named and not used.

Checkpoints have such a list, and so have the model directories of a run. It finds damage, not forgery: whoever can
write the files can write the list.
"""

import hashlib
import json
import os
from collections.abc import Container, Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from airl_fast.errors import UserError

MODEL = "airl_manifest.json"  # of a model directory; users' own hold a manifest.json of other makers now and then
_FORMAT = 1
_HARMLESS = ("README.md", "Thumbs.db", "desktop.ini")  # no loader reads them, nor a name that begins with a dot
# Of a directory of the user's, where other files come and go: what a loader picks up because of its name, if it is
# there. Python files besides have to be named by one of these, or by one another: a new one is read by nobody.
_FOLDERS = ("", "additional_chat_templates", "custom_generate")
_PICKED_UP = (
    *("*.safetensors", "*.index.json", "*.jinja", "*.model", "config.json", "config.*.json", "generation_config.json"),
    *("adapter_config.json", "*processor_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("tekken.json", "vocab*", "merges.txt", "chat_template.json", "custom_generate/*.py"),
)


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


def keep_list(file: Path, directory: Path) -> None:
    """The sums of the files that are read of a directory of the user's, in a file outside it; where that is there
    already, `check_list` instead, because what began with other files must not go on with these."""
    if file.is_file():
        check_list(file, directory)
        return
    code = (path.name for path in directory.glob("*.py") if path.is_file())
    _write(file, directory, sorted(directory / name for name in {*_picked_up(directory), *code}), {})


def check_list(file: Path, directory: Path) -> None:
    """UserError as `check_model` by a list that `keep_list` wrote; without one, `directory` is taken as it is."""
    if file.is_file():
        _check(file, directory, _picked_up(directory))


def beside(directory: Path) -> Path:
    """The file for the list of what `directory`, a link, leads to."""
    return directory.parent / f"{directory.name}.{MODEL}"


def has_model_list(directory: Path) -> bool:
    return (directory / MODEL).is_file() or beside(directory).is_file()


def check_model(directory: Path) -> None:
    """UserError naming the file of a model directory that is missing, is not as it was written, or was added since: a
    second shard, an adapter or a template would be picked up by whoever reads the directory.

    Give the path as it came: where it is a run's link to a directory of the user's, the list lies beside the link. A
    directory without a list, of a user's or of an older version, is taken as it is. The cost is one reading of the
    files, at the speed of SHA-256.
    """
    if (directory / MODEL).is_file():
        _check(directory / MODEL, directory, _entries(directory))
    for file in {file.resolve(): file for file in map(beside, reversed(_links(directory)))}.values():
        check_list(file, directory)


def _check(file: Path, directory: Path, present: Iterable[str]) -> None:
    """present: what must be on the list `file`, if it is there."""
    found = _problem(file, directory, {})
    if found is None:
        listed: Container[str] = json.loads(file.read_text(encoding="utf-8"))["files"]
        added = next((name for name in present if name not in listed), None)
        found = f"{added} was added to it" if added else None
    if found is not None:
        raise UserError(
            f"{directory} is not as it was written: {found}; restore it from a copy, or, if the change is your own, "
            f"delete {file}."
        )


def _links(directory: Path) -> list[Path]:
    """`directory`, what it is a link to, what that is a link to, and at last the directory itself."""
    places = [directory]
    while places[-1].is_symlink() and len(places) < 40:  # as many as Linux follows
        places.append(places[-1].parent / places[-1].readlink())
    return [*places, Path(os.path.realpath(directory))]


def _entries(directory: Path) -> Iterable[str]:
    """Every name in a model directory of a run that a loader could read: a link or a pipe too, and a link to a
    directory by its own name, because its files are not the run's."""
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = sorted(name for name in subfolders if not _is_harmless(name))
        links = [name for name in subfolders if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            path = Path(folder, name).relative_to(directory).as_posix()
            if path != MODEL and not _is_harmless(name):
                yield path


def _picked_up(directory: Path) -> list[str]:
    """The names of the user's files that are read, links followed: a directory of theirs may be all links."""
    folders = [directory / name for name in _FOLDERS if (directory / name).is_dir()]
    files = [path for folder in folders for path in folder.iterdir() if path.is_file() and not _is_harmless(path.name)]
    names = sorted(path.relative_to(directory).as_posix() for path in files)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in _PICKED_UP)]


def _is_harmless(name: str) -> bool:
    """Of a template's name the dot changes nothing."""
    return name in _HARMLESS or (name.startswith(".") and not name.endswith(".jinja"))


# ---------------------------------------------------------------------------------------------- lists


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MODEL)


def _write(file: Path, directory: Path, files: Iterable[Path], facts: dict[str, Any]) -> None:
    entries = {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in files
    }
    temporary = file.with_name(f".{file.name}.tmp")  # a list that a crash cut short would be damage
    temporary.write_text(json.dumps({"format": _FORMAT, **facts, "files": entries}, indent=1), encoding="utf-8")
    sync(temporary)
    os.replace(temporary, file)


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

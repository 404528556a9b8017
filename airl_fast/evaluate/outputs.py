"""Files that a user names for results: refused before the work when they cannot be written."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from airl_fast.errors import UserError
from airl_fast.rundir import write_atomically


def check_output(option: str, name: str | None, endings: Sequence[str] = ()) -> Path | None:
    """The path of an output, None when it was not asked for. UserError for a directory that is not there, and for an
    ending that says another format."""
    if name is None:
        return None
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{option} {name}: give the name of a file in a directory that exists.")
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{option} {name}: the name must end in {' or '.join(endings)}.")
    return path


def write_json(path: Path, document: Any) -> None:
    """UserError when the file cannot be written; a figure that is NaN or infinite is a mistake of ours and raises."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); check the directory and its space.") from None

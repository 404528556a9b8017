"""Read data files: JSON Lines, gzip by extension, every mistake named by file and line."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from airl_fast.errors import UserError

# Evaluation sets as distributed, by the SHA-256 of their uncompressed content: no training data under any name.
_EVALUATION_ONLY = {
    "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14": "the GSM8K test set",
    "979dd3cf3e50c73cd27df01dcb6e6ba1cc72eafb06859742c14da65f8c6b7b88": "GSM8K's solutions of the test set",
    "2b42dafda7e2ab651ebbceedb86ad4b7890a8140a3776986f3596f7730dd148f": "the MMLU-Pro test set",
    "572988add6339743d619697dd759d032e9ed8b94fb463f206f75de43fefa7f82": "the MedQA test set",
}


def data_file(folder: str | None, *names: str, task: str) -> Path:
    """The first of `names` (each plain or .gz) inside a task's folder. UserError names what is missing."""
    wanted = " or ".join(names)
    if folder is None:
        raise UserError(f"task {task!r} reads files: set data.path to the folder that holds {wanted}.")
    root = Path(folder)
    if not root.exists():
        raise UserError(f"data.path: {folder} does not exist; give the folder that holds {wanted}.")
    if not root.is_dir():
        raise UserError(f"data.path: {folder} is a file; give the folder that holds {wanted}.")
    for name in names:
        for candidate in (root / name, root / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise UserError(f"data.path: {folder} holds no {wanted} (plain or .gz); download it or correct the path.")


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) of every line that is not blank. UserError names file and line of a bad one."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield number, parse_row(path, number, line)


def stream_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """As `read_rows`, but read as it is asked for, so that a file of any size passes through."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8.") from error
                if text.strip():
                    yield number, parse_row(path, number, text)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file; download it again or drop the .gz.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.") from error


def parse_row(path: Path, number: int, line: str) -> dict:
    """One line as a JSON object, or UserError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", "a number or nesting beyond reason")
        raise UserError(f"{path}:{number}: not JSON ({reason}); write one JSON object a line.") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: a {type(row).__name__}, not an object; write {{...}} with the fields.")
    return row


def read_text(path: Path) -> str:
    """The whole file as UTF-8, unzipped when it ends in .gz. UserError when it cannot be read."""
    content = _content(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8.") from error


def refuse_evaluation_file(path: Path) -> None:
    """Raise UserError when a training file is a published evaluation set, whatever it is called."""
    known = _EVALUATION_ONLY.get(hashlib.sha256(_content(path)).hexdigest())
    if known:
        raise UserError(f"{path}: this is {known}, which is for evaluation only; train on another file.")


def _content(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a complete gzip file; download it again or drop the .gz.") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions.") from error


def text_field(path: Path, number: int, row: dict, key: str) -> str:
    """A field that must be a string with content."""
    if key not in row:
        raise UserError(f"{path}:{number}: lacks the field {key!r}; add it.")
    value = row[key]
    if not isinstance(value, str):
        raise UserError(f"{path}:{number}: {key!r} is {_kind(value)}, not a string; write it as text.")
    if not value.strip():
        raise UserError(f"{path}:{number}: {key!r} is empty; fill it in or delete the line.")
    return value


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"

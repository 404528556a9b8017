"""JSON Lines for standard output or a file, which carries its name only once it is complete."""

import gzip
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from airl_fast.errors import UserError


class LineWriter:
    """Writes one object a line, gzip by extension. Use it as a context manager: the lines lie in `partial` (the name
    and .partial) and get the name when the block ends without an error; after one they stay where they are.

    path: None writes to standard output. UserError when the file cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.rows = path, 0
        self.partial = None if path is None else partial_of(path)
        self._raw: io.BufferedWriter | None = None
        self._lines: Any = sys.stdout

    def __enter__(self) -> Self:
        if self.partial is not None:
            try:
                self._raw = self.partial.open("wb")
            except OSError as error:
                raise self._failed(error) from None
            stream: Any = self._raw
            if self.path.suffix == ".gz":
                stream = gzip.GzipFile(filename="", fileobj=self._raw, mode="wb", mtime=0, compresslevel=6)
            self._lines = io.TextIOWrapper(stream, encoding="utf-8")
        return self

    def write(self, row: Mapping[str, Any]) -> None:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        try:
            self._lines.write(text + "\n")
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failed(error) from None
        self.rows += 1

    def flush(self) -> None:
        """What was written can be read by others from here on."""
        try:
            self._lines.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failed(error) from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self.partial is None:
            if kind is None:
                self.flush()
            return
        try:
            self._lines.close()  # ends the gzip stream, so that what is there can be read after an error too
            self._raw.close()
            if kind is None:
                os.replace(self.partial, self.path)
        except OSError as failure:
            if kind is None:
                raise self._failed(failure) from None

    def _failed(self, error: OSError) -> UserError:
        return UserError(f"{self.partial or 'standard output'} could not be written ({error.strerror}).")


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def check_lines_output(name: str | None, inputs: Sequence[Path], *, force: bool) -> Path | None:
    """The path of `-o NAME`, None for standard output. UserError, before any work, for a name that cannot be a file,
    for one that exists (unless `force`), and always for the input itself."""
    if name is None or name == "-":
        return None
    path = Path(name)
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"-o {name}: give the name of a file in a directory that exists.")
    for given in inputs:
        if any(each.exists() and given.exists() and each.samefile(given) for each in (path, partial_of(path))):
            raise UserError(f"-o {name}: this is the input, which would be lost; choose another name.")
    if path.exists() and not force:
        raise UserError(f"-o {name}: exists already; choose another name, or replace it with --force.")
    return path

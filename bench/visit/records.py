"""One file of JSON lines that every stage appends to as it measures: a visit that is cut short has what it measured.

A record is {"stage": ..., "kind": ..., ...}. Kinds, by who writes them:

    environment                 device, versions and the stages to come, first
    begin, end                  a stage: its limit in seconds; its exit code (null when stopped) and seconds
    case-begin, case            a named case of a stage: `passed`, `seconds`, `error` (its traceback)
    versions, row, absent       of `bench.ops`; each problem is a case
    update, update-header       of `bench.updates`        step           of `bench.step`
    kernels                     an operation's kernels by device time    counters    what ncu read of them
"""

import json
from pathlib import Path

MOST_TEXT = 4000  # characters of a traceback that are kept, the last ones


def append(path: Path, stage: str, kind: str, **fields: object) -> None:
    """One write, so that several processes may append to the file."""
    line = json.dumps({"stage": stage, "kind": kind, **fields}, default=str) + "\n"
    with path.open("ab", buffering=0) as file:
        file.write(line.encode())


def read(path: Path) -> list[dict]:
    """Every whole record; a line that was cut off, or is none, is left out. No file: no records."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and {"stage", "kind"} <= value.keys():
            found.append(value)
    return found


def of(records: list[dict], stage: str | None = None, kind: str | None = None) -> list[dict]:
    return [r for r in records if stage in (None, r["stage"]) and kind in (None, r["kind"])]

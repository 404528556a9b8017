"""Run a stage's command, printing and keeping what it prints; stop it, and all that it started, at its limit."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from bench.tied import tied

ROOT = Path(__file__).resolve().parents[2]
_DRAIN = 2.0  # seconds to read what was printed last
MOST_LOG = 15 << 20  # bytes of log.txt; what is printed beyond is not kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A command that ended. code: its exit code, None when it was stopped for its time."""

    code: int | None
    seconds: float


def run(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> Ran:
    """From the project's folder, in a process group of its own, which is killed after `limit` seconds.

    Whoever keeps its output open beyond its end, a compiler's workers for example, is not waited for. When this process
    is killed the command is as well.
    """
    start, code = time.monotonic(), None
    process = subprocess.Popen(
        tied(command), cwd=ROOT, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n")
        reader = threading.Thread(target=_keep, args=(process.stdout, file), daemon=True)
        reader.start()
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _kill(process.pid)  # also what it left running: it must not share the device with the next stage
            process.wait()
        reader.join(_DRAIN)
        file.write("" if code is not None else f"stopped after {limit:.0f} s\n")
    return Ran(code=code, seconds=time.monotonic() - start)


def _keep(output: Iterable[str], file: TextIO) -> None:
    with contextlib.suppress(ValueError):  # the log was closed, as nobody waits any more
        for line in output:
            if file.tell() < MOST_LOG:
                file.write(line)
                file.flush()
            print(line, end="", flush=True)


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)

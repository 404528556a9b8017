"""Run a stage's command, printing and keeping what it prints; stop it, and all that it started, at its limit."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LOG = 15 << 20  # bytes of log.txt; what is printed beyond is not kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """A command that ended. code: its exit code, None when it was stopped for its time."""

    code: int | None
    seconds: float


def run(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> Ran:
    """From the project's folder, in a process group of its own, which is killed after `limit` seconds."""
    start = time.monotonic()
    process = subprocess.Popen(
        command, cwd=ROOT, env=dict(environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        _kill(process.pid)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"\n$ {' '.join(command)}\n")
            for line in process.stdout:
                if file.tell() < MOST_LOG:
                    file.write(line)
                    file.flush()
                print(line, end="", flush=True)
            process.wait()
            if stopped.is_set():
                file.write(f"stopped after {limit:.0f} s\n")
    finally:
        timer.cancel()
        _kill(process.pid)  # what it left running must not share the device with the next stage
    return Ran(code=None if stopped.is_set() else process.returncode, seconds=time.monotonic() - start)


def _kill(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return

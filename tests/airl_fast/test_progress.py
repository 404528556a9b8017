"""Progress: plain lines in a log, a panel on a terminal, and errors left readable in both."""

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from airl_fast.progress import Progress, duration, number

ROOT = Path(__file__).parents[2]
FIELDS = {"reward gap": 1.2345, "D acc": 0.75, "pass@1": float("nan"), "seconds": 0.5, "eta_s": 125.0}


def log_of(total: int, every: int) -> list[str]:
    stream = io.StringIO()
    with Progress(total, "demo", every=every, stream=stream) as progress:
        for step in range(1, total + 1):
            progress.phase("sample")
            progress.step(step, FIELDS)
    return stream.getvalue().splitlines()


def test_a_log_gets_one_plain_line_every_n_steps() -> None:
    lines = log_of(total=7, every=3)
    assert [re.search(r"step (\d+)/7", line).group(1) for line in lines] == ["1", "3", "6", "7"]
    assert lines[0] == "demo  step 1/7  reward gap 1.234  D acc 0.750  pass@1 -  time 0.50s  eta 2m05s"
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_about_twenty_lines_by_default() -> None:
    assert len(log_of(total=200, every=0)) == 21
    assert len(log_of(total=5, every=0)) == 5


def test_messages_are_neither_markup_nor_wrapped() -> None:
    stream = io.StringIO()
    with Progress(1, "demo", stream=stream) as progress:
        progress.message("kept [bold]6/8[/bold] of " + "x" * 300)
    assert stream.getvalue() == "kept [bold]6/8[/bold] of " + "x" * 300 + "\n"


def run_in_terminal(code: str, columns: int = 80) -> tuple[str, int]:
    """Everything that a process writes to a real pseudo-terminal, and its exit status."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": "30"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    chunks = []
    while True:
        try:
            chunk = os.read(leader, 65536)
        except OSError:  # Linux reports the closed terminal as an error
            break
        if not chunk:
            break
        chunks.append(chunk)
    os.close(leader)
    return b"".join(chunks).decode(), process.wait()


def screen(written: str) -> list[str]:
    """The lines that stay on the screen: a small terminal that knows the codes rich uses."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"(\x1b\[[?\d;]*[A-Za-z])|([^\x1b])", written):
        if text == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif text == "\r":
            column = 0
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
            column += 1
        elif code.endswith("A"):
            row -= int(code[2:-1] or 1)
        elif code.endswith("K"):
            lines[row] = "" if code == "\x1b[2K" else lines[row][:column]
    return [line.rstrip() for line in lines if line.strip()]


CODE = """
import time
from airl_fast.progress import Progress
with Progress(3, "demo") as p:
    p.phase("sample")
    time.sleep(0.3)
    for step in (1, 2):
        p.step(step, {"reward gap": 0.5 * step, "eta_s": 61.0})
        p.message(f"note {step} [x]")
        p.phase("policy")
        time.sleep(0.3)
    END
print("result")
"""


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_a_terminal_gets_a_live_panel_that_leaves_clean_lines(columns: int) -> None:
    written, status = run_in_terminal(CODE.replace("END", "pass"), columns)
    assert status == 0
    for part in ("sample", "step 2/3", "reward gap", "eta 1m01s", "╭", "\x1b["):
        assert part in written
    assert screen(written) == ["note 1 [x]", "note 2 [x]", "demo  step 2/3  reward gap 1.000  eta 1m01s", "result"]
    assert written.count("\x1b[?25h") >= written.count("\x1b[?25l") == 1  # the cursor is back


def test_an_error_inside_the_panel_is_readable() -> None:
    written, status = run_in_terminal(CODE.replace("END", 'raise SystemExit("the disk is full")'))
    assert status == 1
    assert screen(written)[-2:] == ["demo  step 2/3  reward gap 1.000  eta 1m01s", "the disk is full"]
    assert "\x1b[?25h" in written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (-1.5, "-1.500"),
        (12.345, "12.3"),
        (12345.0, "12345"),
        (7, "7"),
        (0.0, "0.000"),
        (1e-5, "1.0e-05"),
        (3.2e7, "3.2e+07"),
        (float("nan"), "-"),
        (float("inf"), "inf"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (100_800, "1d04h"), (float("inf"), "-")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text

"""What a person sees while a run goes on: one live panel on a terminal, one plain line every few steps in a log."""

import math
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self, TextIO

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


class Progress:
    """Live progress of a run. Use as a context manager, so that the terminal is whole again when an error ends it.

    total_steps: steps of the whole run. every: plain-text lines are printed for steps 1, every, 2·every, … and the
    last (0: about twenty lines a run). stream: where to write, standard error by default, so that standard output
    stays free for results. A terminal gets the live panel; anything else gets plain lines.
    """

    def __init__(self, total_steps: int, run_name: str, *, every: int = 0, stream: TextIO | None = None) -> None:
        self._total, self._name = total_steps, run_name
        self._every = every or max(1, total_steps // 20)
        self._stream = stream or sys.stderr
        self._console = Console(file=self._stream, highlight=False)
        self._live: Live | None = None
        self._step, self._phase = 0, "start"
        self._fields: dict[str, float] = {}
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            # Transient: the panel goes away at the end and the caller's table of results stands alone.
            self._live = Live(console=self._console, get_renderable=self._panel, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._step:
                self._print(self._line())

    def phase(self, name: str) -> None:
        """Name what is happening now ("sample", "discriminator", "policy", "evaluate", …)."""
        self._phase = name

    def step(self, step: int, fields: Mapping[str, float]) -> None:
        """Report that `step` (from 1) is done. fields: what to show, in order, under the names to show.

        `seconds` and `eta_s` are shown as durations, everything else as numbers; a NaN is shown as '-'.
        """
        self._step, self._fields = step, dict(fields)
        if self._live is None and (step % self._every == 0 or step in (1, self._total)):
            self._print(self._line())

    def message(self, text: str) -> None:
        """Print a line above the panel, or in its turn in a log."""
        self._print(text)

    def _print(self, text: str) -> None:
        # Plain text: a bracket in a path or a reward is not rich's markup, and a log line is never wrapped.
        self._console.print(Text(text), soft_wrap=True)
        self._stream.flush()

    def _line(self) -> str:
        shown = "  ".join(f"{name} {value}" for name, value in self._shown())
        return f"{self._name}  step {self._step}/{self._total}  {shown}".rstrip()

    def _shown(self) -> list[tuple[str, str]]:
        """(label, formatted value) of each field."""
        pairs = []
        for name, value in self._fields.items():
            if name == "eta_s":
                pairs.append(("eta", duration(value)))
            elif name == "seconds":
                pairs.append(("time", f"{value:.2f}s"))
            else:
                pairs.append((name, number(value)))
        return pairs

    def _panel(self) -> Panel:
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        elapsed = duration(time.monotonic() - self._began)
        bar = ProgressBar(total=self._total, completed=self._step)
        head.add_row(Text(f"step {self._step}/{self._total}"), bar, Text(f"{self._phase} · {elapsed}"))
        cells = [f"{name} {value}" for name, value in self._shown()] or ["waiting for the first step"]
        values = Columns([Text(cell, style="bold", no_wrap=True) for cell in cells], equal=True, padding=(0, 2))
        return Panel(Group(head, values), title=Text(self._name), title_align="left", border_style="dim")


def number(value: float) -> str:
    """Three significant decimals, at most seven characters for everyday sizes: 0.123, 12.3, 12345, 1.2e-05."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if isinstance(value, int) or (value == int(value) and 1000 <= abs(value) < 1e6):
        return str(int(value))
    size = abs(value)
    if size != 0 and (size < 1e-3 or size >= 1e6):
        return f"{value:.1e}"
    return f"{value:.3f}" if size < 10 else f"{value:.1f}"


def duration(seconds: float) -> str:
    """45s, 3m05s, 2h07m, 1d04h."""
    if not math.isfinite(seconds):
        return "-"
    whole = max(0, round(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"

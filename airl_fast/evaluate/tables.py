"""Tables of figures as plain text of at most 100 columns, or as Markdown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Protocol

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from airl_fast.evaluate.summary import ABSENT, WIDTH


class Interval(Protocol):
    """A figure with its bounds, such as passk.Estimate."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """headings: one a column. rows: cells as text, as many as headings. The first column is text on the left and may
    wrap; the others are figures on the right, unless `words` says that all are text."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: bool = False


def as_text(grid: Grid) -> str:
    console = Console(file=StringIO(), width=WIDTH, color_system=None, force_terminal=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, heading in enumerate(grid.headings):
        text = column == 0 or grid.words
        table.add_column(escape(heading), justify="left" if text else "right", no_wrap=not text, overflow="fold")
    for row in grid.rows:
        table.add_row(*map(escape, row))
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def as_markdown(grid: Grid) -> str:
    sides = [":--" if column == 0 or grid.words else "--:" for column in range(len(grid.headings))]
    lines = [grid.headings, sides, *grid.rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def percent(estimate: Interval | None) -> str:
    """ "47.4 [41.0, 53.7]"."""
    return in_brackets(estimate, lambda x: f"{100 * x:.1f}")


def percent_value(estimate: Interval | None) -> str:
    return ABSENT if estimate is None else f"{100 * estimate.value:.1f}"


def signed_percent(estimate: Interval | None) -> str:
    """ "+12.3 [+10.1, +14.5]", in percentage points."""
    return in_brackets(estimate, lambda x: f"{100 * x:+.1f}")


def plain(estimate: Interval | None) -> str:
    """ "0.872 [0.820, 0.920]"."""
    return in_brackets(estimate, lambda x: f"{x:.3f}")


def in_brackets(estimate: Interval | None, spell: Callable[[float], str]) -> str:
    if estimate is None:
        return ABSENT
    return f"{spell(estimate.value)} [{spell(estimate.low)}, {spell(estimate.high)}]"


def paragraph(lines: Sequence[str]) -> str:
    """Notes below a table, each on lines of its own, indented by one."""
    console = Console(file=StringIO(), width=WIDTH - 1, color_system=None, force_terminal=False, highlight=False)
    for line in lines:
        console.print(line, markup=False, soft_wrap=False)
    return "".join(f" {line.rstrip()}\n" for line in console.file.getvalue().splitlines())

"""The results for people: a Markdown table, the changes since an earlier run, and a plot."""

from collections.abc import Sequence
from pathlib import Path

from bench.errors import BadArgument
from bench.results import Change, Document, Row


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it reads well in a terminal; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    right = [all(_is_number(row[i]) for row in rows) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(cells, widths, right, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    rule = (
        "-" * (width + 1) + ":" if number else "-" * (width + 2) for width, number in zip(widths, right, strict=True)
    )
    return "\n".join((line(header), f"|{'|'.join(rule)}|", *map(line, rows)))


def _is_number(cell: str) -> bool:
    return cell == "" or cell.lstrip("+-").removesuffix("x").removesuffix("%").replace(".", "", 1).isdigit()


def results_table(rows: Sequence[Row]) -> str:
    """One line per row; "vs airl" is a backend's time over ours."""
    ours = {(row.op, row.mode, row.shape): row for row in rows if row.backend == "airl"}
    lines = []
    last: tuple[str, ...] = ()
    for row in rows:
        key = (row.op, row.mode, row.shape)
        mine = ours.get(key)
        lines.append(
            [
                *(("", "", "") if key == last else key),
                row.backend,
                short(row.ms),
                short(row.gb_per_s),
                short(row.tflop_per_s) if row.flops else "",
                f"{row.percent_of_floor:.0f}%",
                "" if row.peak_mib is None else short(row.peak_mib),
                f"{row.ms / mine.ms:.2f}x" if mine is not None else "",
            ]
        )
        last = key
    header = ("op", "mode", "shape", "backend", "ms", "GB/s", "TFLOP/s", "of floor", "peak MiB", "time vs airl")
    return table(header, lines)


def short(value: float) -> str:
    """Three digits that matter, without exponents."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def changes_table(changes: Sequence[Change]) -> str:
    lines = [
        [
            *(change.now.op, change.now.mode, change.now.shape, change.now.backend),
            short(change.before.ms),
            short(change.now.ms),
            f"{100 * (change.ratio - 1):+.0f}%",
            "SLOWER" if change.slower else "",
        ]
        for change in changes
    ]
    return table(("op", "mode", "shape", "backend", "ms before", "ms now", "change", ""), lines)


def absences(document: Document) -> str:
    """What is missing and why, one line per backend and reason."""
    lines = []
    for kind in ("failed", "left out", "skipped"):
        grouped: dict[tuple[str, str], dict[str, None]] = {}
        for entry in document.of_kind(kind):
            name = entry.op if kind == "skipped" else f"{entry.op} {entry.mode} {entry.shape}"
            grouped.setdefault((entry.backend, entry.reason), {})[name] = None
        for (backend, reason), names in grouped.items():
            lines.append(f"{kind}: {backend}: {reason} ({', '.join(names)})")
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path, title: str) -> None:
    """Bars of the percentage of the floor, one group per problem, one colour per backend."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BadArgument(
            "--plot: matplotlib is not installed; `pip install matplotlib`, or leave --plot out."
        ) from None
    backends = list(dict.fromkeys(row.backend for row in rows))
    places, ticks, last = [], {}, None
    for row in rows:
        problem = f"{row.op} {row.mode} {row.shape}"
        places.append((places[-1] if places else 0) + (1 if problem == last else 2))
        ticks.setdefault(problem, places[-1])
        last = problem
    figure = Figure(figsize=(10, 1.5 + 0.13 * (places[-1] if places else 0)), layout="constrained")
    axes = figure.subplots()
    for backend in backends:
        mine = [
            (place, row.percent_of_floor) for place, row in zip(places, rows, strict=True) if row.backend == backend
        ]
        bars = axes.barh([place for place, _ in mine], [value for _, value in mine], 0.9, label=backend)
        axes.bar_label(bars, fmt="%.3g", fontsize=6, padding=2)
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=7)
    axes.axvline(100, color="0.5", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("% of the floor measured in the same run (longer is faster; each tenfold is one step)")
    figure.suptitle(title, fontsize=9)
    axes.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise BadArgument(f"--plot {path}: cannot be written ({error}).") from None

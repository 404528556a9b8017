"""What `airl-fast compare` shows of finished runs: tables as plain text or Markdown, JSON, and a forest plot."""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from airl_fast.evaluate.compare_rows import BASELINES, MEASURES, Row, RunRow, Spread, aggregate, read_runs
from airl_fast.evaluate.plots import BLUE, GREY, figure_of
from airl_fast.evaluate.summary import ABSENT
from airl_fast.evaluate.tables import (
    Grid,
    as_markdown,
    as_text,
    paragraph,
    percent,
    percent_value,
    plain,
    signed_percent,
)

__all__ = ["Row", "RunRow", "Spread", "read_runs", "aggregate", "render", "figure", "as_document"]


def render(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """Tables: what differs, the policies, the reward, and differences to the first row. Rates in per cent."""
    show = as_markdown if markdown else as_text
    parts = []
    if any(row.settings for row in rows):
        parts.append(show(_settings_grid(rows)))
    parts += [show(_policy_grid(rows)), show(_reward_grid(rows))]
    if len(rows) > 1:
        parts.append(show(_difference_grid(rows)))
    notes = _notes(rows)
    parts.append("\n".join(notes) + "\n" if markdown else paragraph(notes))
    return "\n".join(parts)


def _settings_grid(rows: Sequence[Row]) -> Grid:
    """The first row has every key that differs, the others what they have different from it."""
    base = rows[0].settings
    cells = []
    for row in rows:
        own = [f"{key}={value}" for key, value in row.settings.items() if row is rows[0] or value != base[key]]
        cells.append((row.name, ", ".join(own) or "the same"))
    return Grid(headings=("run", "configuration, where it differs"), rows=tuple(cells), words=True)


def _policy_grid(rows: Sequence[Row]) -> Grid:
    return Grid(
        headings=("run", "seeds", "start pass@1", "trained pass@1", "seconds"),
        rows=tuple(
            (
                row.name,
                ",".join(map(str, row.seeds)) if len(row.seeds) <= 5 else f"{len(row.seeds)} of them",
                percent(row.spread("start")),
                percent(row.spread("pass_at_1")),
                f"{row.seconds:.0f}",
            )
            for row in rows
        ),
    )


def _reward_grid(rows: Sequence[Row]) -> Grid:
    return Grid(
        headings=("reward of", "rerank pass@1", "random", "step Hit@1", "chance", "AUROC"),
        rows=tuple(
            (
                row.name,
                percent(row.spread("rerank")),
                percent_value(row.spread("random")),
                percent(row.spread("localise")),
                percent_value(row.spread("chance")),
                plain(row.spread("auroc")),
            )
            for row in rows
        ),
    )


def _difference_grid(rows: Sequence[Row]) -> Grid:
    measures = ("pass_at_1", "rerank", "localise", "auroc")
    return Grid(
        headings=(f"minus {rows[0].name}", "trained pass@1", "rerank pass@1", "step Hit@1", "AUROC x 100"),
        rows=tuple(
            (row.name, *(signed_percent(row.difference(rows[0], m)).replace(", ", ",") for m in measures))
            for row in rows[1:]
        ),
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    chosen_from = dict.fromkeys(run.summary.rerank_n for row in rows for run in row.runs)
    chosen_from.pop(None, None)
    samples = " or ".join(map(str, chosen_from)) if chosen_from else ABSENT
    notes = [
        f"Rates in per cent. Rerank: one of {samples} samples of the start policy, picked by the reward; random: "
        "picked at random. Step Hit@1: the reward names the first wrong step. AUROC: reward against correctness "
        "within a prompt; 0.5 is chance."
    ]
    single, several = (any((len(row.runs) > 1) is kind for row in rows) for kind in (False, True))
    if single:
        notes.append("One run: in brackets its 95% interval over prompts.")
        if len(rows) > 1:
            notes.append(
                "Its difference: the two intervals combined as if their prompts were independent (MOVER), which on "
                "the same prompts is too wide rather than too narrow."
            )
    if several:
        notes.append("Several seeds: their mean and, in brackets, the lowest and highest; differences seed by seed.")
    return notes


_PANELS = {
    "pass_at_1": ("trained pass@1 (%)", "start policy"),
    "rerank": ("rerank pass@1 (%)", "random pick"),
    "localise": ("first wrong step, Hit@1 (%)", "chance"),
    "auroc": ("AUROC within a prompt", "chance"),
}


def figure(rows: Sequence[Row]) -> Figure:
    """A forest plot: a panel a measure, a line a row. A dot a seed, a line over the interval (of one run) or the range
    (of several), a bar at the mean, and a grey tick at what needs no reward or training."""
    drawn = figure_of(13.0, 1.5 + 0.34 * len(rows))
    axes = drawn.subplots(1, len(_PANELS), sharey=True)
    for axis, measure in zip(axes, _PANELS, strict=True):
        _draw_panel(axis, rows, measure)
    axes[0].set_yticks(range(len(rows)), [row.name for row in rows])
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return drawn


def _draw_panel(axis: Axes, rows: Sequence[Row], measure: str) -> None:
    title, floor = _PANELS[measure]
    axis.set_title(title)
    axis.set_xlabel(f"grey tick: {floor}", color=GREY, size=9)
    scale = 1.0 if measure == "auroc" else 100.0
    for place, row in enumerate(rows):
        baseline = row.spread(BASELINES[measure]) if measure in BASELINES else Spread(0.5, 0.5, 0.5, 1)
        spread = row.spread(measure)
        if spread is None:
            axis.annotate(ABSENT, (0.02, place), xycoords=("axes fraction", "data"), va="center", color=GREY, size=8)
            continue
        if baseline is not None:
            axis.plot(scale * baseline.value, place, "|", color=GREY, markersize=12, markeredgewidth=2)
        known = [scale * e.value for run in row.runs if (e := run.estimate(measure)) is not None]
        axis.plot([scale * spread.low, scale * spread.high], [place, place], color=BLUE, linewidth=1.6)
        axis.plot(known, [place] * len(known), "o", color=BLUE, alpha=0.55, markersize=5)
        if spread.runs > 1:
            axis.plot([scale * spread.value] * 2, [place - 0.28, place + 0.28], color="black", linewidth=1.8)
    axis.grid(axis="x", color="#DDDDDD", linewidth=0.6)


def as_document(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything for programs: fractions; null where a run has no such part. `difference` is to the first row."""

    def figures(of: Callable[[str], Spread | None]) -> dict[str, Any]:
        found = {measure: of(measure) for measure in MEASURES}
        return {
            measure: spread and {"value": spread.value, "low": spread.low, "high": spread.high, "runs": spread.runs}
            for measure, spread in found.items()
        }

    def run(each: RunRow) -> dict[str, Any]:
        known = {measure: each.estimate(measure) for measure in MEASURES}
        return {
            "path": str(each.path),
            "seed": each.seed,
            "seconds": each.summary.seconds,
            "rerank_n": each.summary.rerank_n,
            "figures": {m: e and {"value": e.value, "low": e.low, "high": e.high} for m, e in known.items()},
        }

    return {
        "rows": [
            {
                "name": row.name,
                "settings": dict(row.settings),
                "seeds": list(row.seeds),
                "seconds": row.seconds,
                "figures": figures(row.spread),
                "difference": None if row is rows[0] else figures(lambda m, row=row: row.difference(rows[0], m)),
                "runs": [run(each) for each in row.runs],
            }
            for row in rows
        ]
    }

"""The outcome of an ablation: a row a variant, over its seeds, beside the variant that all are compared with."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from airl_fast.ablate.grid import Job, Variant
from airl_fast.ablate.runner import summary_of
from airl_fast.evaluate.plots import BLUE, GREY, figure_of, save_figure
from airl_fast.evaluate.summary import ABSENT, WIDTH, Summary, read_summary
from airl_fast.measures.passk import Estimate
from airl_fast.rundir import write_atomically

# measure: (heading, what a run without skill reaches)
MEASURES = {
    "pass_at_1": ("AIRL pass@1", "start policy"),
    "rerank": ("rerank pass@1", "random pick"),
    "localise": ("first wrong step", "chance"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One variant. values: by measure, one fraction a seed in the order of `seeds`; None where the run has none.

    failed: seeds whose run did not finish.
    """

    name: str
    topic: str
    seeds: tuple[int, ...]
    values: Mapping[str, tuple[float | None, ...]]
    failed: tuple[int, ...]

    def differences(self, base: "Row", measure: str) -> list[float]:
        """Of this variant to the base, seed by seed where both have the figure."""
        mine, theirs = (dict(zip(row.seeds, row.values[measure], strict=True)) for row in (self, base))
        return [mine[s] - theirs[s] for s in mine if s in theirs and None not in (mine[s], theirs[s])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """rows: in the grid's order, the first the one compared with. floor: mean of what needs no reward, by measure."""

    rows: tuple[Row, ...]
    floor: Mapping[str, float | None]


def read_outcome(variants: Sequence[Variant], jobs: Sequence[Job]) -> Outcome:
    summaries = {(job.variant, job.seed): read_summary(summary_of(job)) for job in jobs if summary_of(job).is_file()}
    rows = []
    for variant in variants:
        seeds = tuple(job.seed for job in jobs if job.variant == variant.name)
        own = [summaries.get((variant.name, seed)) for seed in seeds]
        values = {measure: tuple(_value(summary, measure) for summary in own) for measure in MEASURES}
        failed = tuple(seed for seed, summary in zip(seeds, own, strict=True) if summary is None)
        rows.append(Row(name=variant.name, topic=variant.topic, seeds=seeds, values=values, failed=failed))
    floor = {measure: _mean([_floor(summary, measure) for summary in summaries.values()]) for measure in MEASURES}
    return Outcome(rows=tuple(rows), floor=floor)


def render(outcome: Outcome) -> str:
    """At most 100 columns: means over the seeds in per cent, their lowest and highest, the paired difference to the
    first row."""
    console = Console(file=StringIO(), width=WIDTH, color_system=None, force_terminal=False, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("variant", max_width=29)
    base = outcome.rows[0]
    for measure, (heading, _) in MEASURES.items():
        table.add_column(heading, justify="right")
        if measure == "pass_at_1":
            table.add_column("against base", justify="right")
    topic = base.topic
    for row in outcome.rows:
        if row.topic != topic:
            table.add_section()
            topic = row.topic
        cells = []
        for measure in MEASURES:
            cells.append(_spread([v for v in row.values[measure] if v is not None]))
            if measure == "pass_at_1":
                cells.append(ABSENT if row is base else _spread(row.differences(base, measure), signed=True))
        table.add_row(escape(row.name), *cells)
    table.add_section()
    floors = [ABSENT if outcome.floor[m] is None else f"{100 * outcome.floor[m]:.1f}" for m in MEASURES]
    table.add_row("without a reward", floors[0], "", *floors[1:])
    console.print(table)
    count = "one seed" if len(base.seeds) == 1 else f"{len(base.seeds)} seeds"
    console.print(
        f"\n In per cent: the mean over {count} and, in brackets, the lowest and the highest. Without a "
        "reward:\n " + ", ".join(f"{floor} for {heading}" for heading, floor in MEASURES.values()) + "."
    )
    for row in outcome.rows:
        if row.failed:
            console.print(f" {row.name}: no result for seed {', '.join(map(str, row.failed))}.", markup=False)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def write_json(path: Path, outcome: Outcome) -> None:
    """Fractions, one a seed; null where a run has no such figure."""
    document = {
        "floor": dict(outcome.floor),
        "rows": [
            {
                "name": row.name,
                "topic": row.topic,
                "seeds": list(row.seeds),
                "failed": list(row.failed),
                **{measure: list(values) for measure, values in row.values.items()},
                "difference": {measure: row.differences(outcome.rows[0], measure) for measure in MEASURES},
            }
            for row in outcome.rows
        ],
    }
    write_atomically(path, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def draw(path: Path, outcome: Outcome) -> None:
    """A dot a seed, a bar at the mean, a line through the base's mean and a dashed one at what needs no reward."""
    figure = figure_of(13.0, 1.2 + 0.28 * len(outcome.rows))
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    for axis, measure in zip(axes, MEASURES, strict=True):
        _draw_measure(axis, outcome, measure)
    axes[0].set_yticks(range(len(outcome.rows)), [row.name for row in outcome.rows])
    axes[0].invert_yaxis()
    save_figure(figure, path)


def _draw_measure(axis: Axes, outcome: Outcome, measure: str) -> None:
    heading, floor = MEASURES[measure]
    axis.set_title(f"{heading} (%)")
    base = _mean(outcome.rows[0].values[measure])
    if base is not None:
        axis.axvline(100 * base, color=BLUE, linewidth=0.8, alpha=0.6, label=outcome.rows[0].name)
    if outcome.floor[measure] is not None:
        axis.axvline(100 * outcome.floor[measure], color=GREY, linestyle="--", linewidth=1.2, label=floor)
    topic = outcome.rows[0].topic
    for place, row in enumerate(outcome.rows):
        if row.topic != topic:
            axis.axhline(place - 0.5, color="#DDDDDD", linewidth=0.6)
            topic = row.topic
        known = [100 * value for value in row.values[measure] if value is not None]
        if known:
            axis.plot(known, [place] * len(known), "o", color=BLUE, alpha=0.45, markersize=4.5)
            axis.plot([np.mean(known)] * 2, [place - 0.32, place + 0.32], color="black", linewidth=1.8)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=2, frameon=False)


def _value(summary: Summary | None, measure: str) -> float | None:
    if summary is None:
        return None
    estimates = {
        "pass_at_1": summary.pass_at_1.get("airl"),
        "rerank": summary.rerank_pass_at_1.get("reward"),
        "localise": summary.localise_hit_at_1.get("reward"),
    }
    return _of(estimates[measure])


def _floor(summary: Summary, measure: str) -> float | None:
    estimates = {
        "pass_at_1": summary.pass_at_1.get("start"),
        "rerank": summary.rerank_pass_at_1.get("random"),
        "localise": summary.localise_hit_at_1.get("chance"),
    }
    return _of(estimates[measure])


def _of(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.value


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _spread(values: Sequence[float], signed: bool = False) -> str:
    """The mean with one decimal, the range in whole per cent."""
    if not values:
        return ABSENT
    sign = "+" if signed else ""
    mean, low, high = 100 * np.mean(values), 100 * min(values), 100 * max(values)
    return rf"{mean:{sign}.1f} \[{low:{sign}.0f}, {high:{sign}.0f}]"

"""Figures of a run directory: `plots.png` (learning curves) and `summary.png` (figures with intervals and chance).

Drawn with matplotlib's file backend, without pyplot's global state. Colours are those of Okabe and Ito, which stay
apart for colour-blind readers; lines and bars are labelled, so that colour never carries meaning alone.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from airl_fast.errors import UserError
from airl_fast.evaluate.summary import LOCALISERS, POLICIES, RERANKERS, Summary, read_summary
from airl_fast.measures.passk import Estimate

# Keys of metrics.jsonl -> title of the panel. A key may be logged under its stage ("policy/entropy"). A key that a
# run did not log leaves its panel out.
STEP_KEY = "step"
SECONDS_PREFIXES = ("seconds/", "seconds_")
SECONDS_TOTAL = "step"  # seconds/step is the sum of the phases and what lies between them
CURVES = {
    "reward_gap": "reward gap (expert − policy)",
    "d_accuracy": "discriminator accuracy",
    "sample_pass_at_1": "pass@1 of the samples",
    "kl_to_start": "KL to the start policy (nats/token)",
    "entropy": "policy entropy (nats/token)",
    "mean_length": "completion length (tokens)",
    "clip_fraction": "clipped share of tokens",
    "mismatch_kl": "sampler–trainer mismatch KL",
}
ALIASES = {"d_accuracy": "accuracy"}
SHARES = {"d_accuracy": 0.5, "sample_pass_at_1": None}  # drawn from 0 to 1, and where chance lies

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#8C8C8C"
PHASES = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW)
BAR_COLOURS = {"airl": BLUE, "reward": BLUE, "grpo": GREEN, "sft": ORANGE, "majority": ORANGE, "logprob": PINK}
MAX_HALF_WINDOW = 25  # steps on either side that the drawn average takes in, at most

Series = tuple[list[float], list[float]]


def plot_run(run_dir: Path) -> list[Path]:
    """Draw what the run has: plots.png from metrics.jsonl, summary.png from summary.json. Returns the files written.

    UserError when the directory has neither, or when one of them is damaged.
    """
    metrics, summary = run_dir / "metrics.jsonl", run_dir / "summary.json"
    written = []
    if metrics.exists():
        written.append(save_figure(curves_figure(read_metrics(metrics)), run_dir / "plots.png"))
    if summary.exists():
        written.append(save_figure(summary_figure(read_summary(summary)), run_dir / "summary.png"))
    if not written:
        raise UserError(f"{run_dir} holds neither metrics.jsonl nor summary.json; give the directory of a run.")
    return written


def read_metrics(path: Path) -> dict[str, Series]:
    """Every numeric key of a metrics file as (steps, values), by step; null and NaN entries are left out.

    A step that occurs twice (a run resumed from an earlier checkpoint) counts as last written. Rows without a step
    are skipped, and so is a broken last line (a run killed while writing); any other raises UserError.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    series: dict[str, dict[float, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not a JSON object; restore or delete the line.") from None
        if not _is_number(row.get(STEP_KEY)):
            continue
        for key, value in row.items():
            if key != STEP_KEY and _is_number(value):
                series.setdefault(key, {})[float(row[STEP_KEY])] = float(value)
    if not series:
        raise UserError(f"{path} holds no finished step yet; let the run take one first.")
    return {key: (sorted(points), [points[s] for s in sorted(points)]) for key, points in series.items()}


def curves_figure(series: Mapping[str, Series]) -> Figure:
    """One panel for each logged curve, and the seconds of every phase stacked."""
    curves = {key: logged for key in CURVES if (logged := find_series(series, key)) is not None}
    phases = phases_of(series)
    panels = len(curves) + bool(phases)
    if panels == 0:
        raise UserError(f"the metrics hold none of the curves to draw: {', '.join(CURVES)}.")
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = figure_of(4.2 * columns, 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for axis, (key, logged) in zip(axes, curves.items(), strict=False):
        _draw_curve(axis, key, *logged)
    if phases:
        _draw_phases(axes[len(curves)], phases)
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure


def summary_figure(summary: Summary) -> Figure:
    """Bars with 95% intervals: policies, rerankers (dashed: random), localisers (dashed: chance)."""
    figure = figure_of(13.0, 4.2)
    policies, picks, steps = figure.subplots(1, 3)
    _draw_bars(policies, "pass@1 by policy", summary.pass_at_1, POLICIES, chance="start", chance_label="start")
    title = "pass@1 of one pick" + (f" of {summary.rerank_n}" if summary.rerank_n else "")
    _draw_bars(picks, title, summary.rerank_pass_at_1, RERANKERS, chance="random", chance_label="random")
    _draw_bars(
        steps, "first wrong step: Hit@1", summary.localise_hit_at_1, LOCALISERS, chance="chance", chance_label="chance"
    )
    return figure


def find_series(series: Mapping[str, Series], key: str) -> Series | None:
    """A curve by its own name, by its name under a stage, or by its alias in the same two ways."""
    for name in (key, ALIASES.get(key, key)):
        for logged in sorted(series, key=len):
            if logged == name or logged.endswith(f"/{name}"):
                return series[logged]
    return None


def phases_of(series: Mapping[str, Series]) -> dict[str, Series]:
    """Seconds of every phase by its name, in the order logged, without the whole step's."""
    found = {
        key.removeprefix(prefix): logged
        for key, logged in series.items()
        for prefix in SECONDS_PREFIXES
        if key.startswith(prefix)
    }
    return {name: logged for name, logged in found.items() if name != SECONDS_TOTAL}


def _draw_curve(axis: Axes, key: str, steps: list[float], values: list[float]) -> None:
    axis.set_title(CURVES[key])
    axis.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1.0, marker="." if len(steps) < 3 else None)
    axis.plot(steps, smoothed(values), color=BLUE, linewidth=1.8)
    axis.set_xlabel("step")
    if key in SHARES:
        axis.set_ylim(-0.02, 1.02)
    chance = SHARES.get(key)
    if chance is not None:
        axis.axhline(chance, color=GREY, linestyle="--", linewidth=1.0)
        axis.annotate("chance", (1.0, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8)


def _draw_phases(axis: Axes, phases: Mapping[str, Series]) -> None:
    """Stack the phases over the steps that any of them logged; a phase without a value there took no time."""
    steps = sorted({s for recorded, _ in phases.values() for s in recorded})
    lookup = [dict(zip(*series, strict=True)) for series in phases.values()]
    stacks = [smoothed([table.get(s, 0.0) for s in steps]) for table in lookup]
    colours = [PHASES[i % len(PHASES)] for i in range(len(phases))]
    axis.stackplot(steps, stacks, labels=list(phases), colors=colours, alpha=0.85, edgecolor="white", linewidth=0.4)
    axis.set_title("seconds per step, by phase")
    axis.set_xlabel("step")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=7, loc="upper right", ncols=2)  # in the order stacked
    axis.set_ylim(0, 1.4 * max(sum(column) for column in zip(*stacks, strict=True)) or 1.0)  # room for the legend


def _draw_bars(
    axis: Axes,
    title: str,
    estimates: Mapping[str, Estimate | None],
    names: tuple[str, ...],
    chance: str,
    chance_label: str,
) -> None:
    axis.set_title(title)
    axis.set_ylim(0, 112)
    axis.set_yticks(range(0, 101, 20))
    axis.set_ylabel("%")
    axis.set_xticks(range(len(names)), names)
    axis.set_xlim(-0.6, len(names) - 0.4)
    for place, name in enumerate(names):
        estimate = estimates.get(name)
        if estimate is None:
            axis.text(place, 1, "not run", ha="center", va="bottom", color=GREY, size=8)
            continue
        value, low, high = (100 * x for x in (estimate.value, estimate.low, estimate.high))
        axis.bar(place, value, width=0.66, color=BAR_COLOURS.get(name, GREY))
        # An exact expectation can lie a rounding error outside its own interval.
        error = [[max(value - low, 0.0)], [max(high - value, 0.0)]]
        axis.errorbar(place, value, yerr=error, color="black", capsize=4, linewidth=1.2)
        axis.text(place, max(high, value) + 1.5, f"{value:.1f}", ha="center", va="bottom", size=9)
    base = estimates.get(chance)
    if base is not None:
        axis.axhline(100 * base.value, color="black", linestyle="--", linewidth=1.0, label=chance_label, zorder=3)
        axis.legend(fontsize=8, loc="upper left", framealpha=0.9)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def smoothed(values: list[float]) -> list[float]:
    """Centred moving average over a tenth of the run, shorter at both ends: unlike a running one it does not lag."""
    half = min(len(values) // 20, MAX_HALF_WINDOW)
    window = np.ones(2 * half + 1)
    count = np.convolve(np.ones(len(values)), window)[half : half + len(values)]
    return list(np.convolve(values, window)[half : half + len(values)] / count)


def figure_of(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> Path:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_size(10)
        axis.grid(axis="y", color="#DDDDDD", linewidth=0.6)
        axis.set_axisbelow(True)
    try:
        figure.savefig(path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror}); check the directory and its space.") from None
    return path

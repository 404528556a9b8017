"""Figures of a run directory: `plots.png` (learning curves) and `summary.png` (figures with intervals and chance).

Drawn with matplotlib's file backend, without pyplot's global state. Colours are those of Okabe and Ito, which stay
apart for colour-blind readers; lines and bars are labelled, so that colour never carries meaning alone.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from airl_fast.errors import UserError
from airl_fast.evaluate.passk import Estimate
from airl_fast.evaluate.summary import LOCALISERS, POLICIES, RERANKERS, Summary, read_summary

# Keys of metrics.jsonl -> title of the panel. A key that a run did not log leaves its panel out.
STEP_KEY = "step"
SECONDS_PREFIX = "seconds_"
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
FRACTIONS = {"d_accuracy": 0.5, "sample_pass_at_1": None, "clip_fraction": None}  # axis 0..1, and its chance line

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PINK, SKY, YELLOW, GREY = "#CC79A7", "#56B4E9", "#F0E442", "#8C8C8C"
PHASES = (BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, YELLOW)
BAR_COLOURS = {"airl": BLUE, "reward": BLUE, "grpo": GREEN, "sft": ORANGE, "majority": ORANGE, "logprob": PINK}
SMOOTHING = 0.9  # weight of the past in the drawn average

Series = tuple[list[float], list[float]]


def plot_run(run_dir: Path) -> list[Path]:
    """Draw what the run has: plots.png from metrics.jsonl, summary.png from summary.json. Returns the files written.

    UserError when the directory has neither, or when one of them is damaged.
    """
    metrics, summary = run_dir / "metrics.jsonl", run_dir / "summary.json"
    written = []
    if metrics.exists():
        written.append(_save(curves_figure(read_metrics(metrics)), run_dir / "plots.png"))
    if summary.exists():
        written.append(_save(summary_figure(read_summary(summary)), run_dir / "summary.png"))
    if not written:
        raise UserError(f"{run_dir} holds neither metrics.jsonl nor summary.json; give the directory of a run.")
    return written


def read_metrics(path: Path) -> dict[str, Series]:
    """Every numeric key of a metrics file as (steps, values); null and NaN entries are left out.

    A broken last line (a run killed while writing) is ignored, any other raises UserError with its number.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    series: dict[str, Series] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = float(row[STEP_KEY])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise UserError(f"{path} line {number} is not a JSON object with a numeric {STEP_KEY!r}.") from None
        for key, value in row.items():
            if key != STEP_KEY and isinstance(value, int | float) and math.isfinite(value):
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(float(value))
    if not series:
        raise UserError(f"{path} holds no finished step yet; let the run take one first.")
    return series


def curves_figure(series: Mapping[str, Series]) -> Figure:
    """One panel for each logged curve, and the seconds of every phase stacked."""
    keys = [key for key in CURVES if key in series]
    phases = sorted(key for key in series if key.startswith(SECONDS_PREFIX))
    panels = len(keys) + bool(phases)
    if panels == 0:
        raise UserError(f"the metrics hold none of the curves to draw: {', '.join(CURVES)}.")
    columns = min(3, panels)
    rows = -(-panels // columns)
    figure = _figure(4.2 * columns, 2.9 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    axes = list(grid.flat)
    for axis, key in zip(axes, keys, strict=False):
        _draw_curve(axis, key, *series[key])
    if phases:
        _draw_phases(axes[len(keys)], {key: series[key] for key in phases})
    for unused in axes[panels:]:
        unused.set_visible(False)
    return figure


def summary_figure(summary: Summary) -> Figure:
    """Bars with 95% intervals: policies, rerankers (dashed: random), localisers (dashed: chance)."""
    figure = _figure(13.0, 4.2)
    policies, picks, steps = figure.subplots(1, 3)
    _draw_bars(policies, "pass@1 by policy", summary.pass_at_1, POLICIES, chance="start", chance_label="start")
    title = "pass@1 of one pick" + (f" of {summary.rerank_n}" if summary.rerank_n else "")
    _draw_bars(picks, title, summary.rerank_pass_at_1, RERANKERS, chance="random", chance_label="random")
    _draw_bars(
        steps, "first wrong step: Hit@1", summary.localise_hit_at_1, LOCALISERS, chance="chance", chance_label="chance"
    )
    return figure


def _draw_curve(axis: Axes, key: str, steps: list[float], values: list[float]) -> None:
    axis.set_title(CURVES[key])
    axis.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1.0, marker="." if len(steps) < 3 else None)
    axis.plot(steps, _smoothed(values), color=BLUE, linewidth=1.8)
    axis.set_xlabel("step")
    if key in FRACTIONS:
        chance = FRACTIONS[key]
        if chance is not None:
            axis.axhline(chance, color=GREY, linestyle="--", linewidth=1.0)
            axis.annotate("chance", (1.0, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", size=8)
        if key != "clip_fraction":
            axis.set_ylim(-0.02, 1.02)


def _draw_phases(axis: Axes, phases: Mapping[str, Series]) -> None:
    """Stack the phases over the steps that any of them logged; a phase without a value there took no time."""
    steps = sorted({s for recorded, _ in phases.values() for s in recorded})
    lookup = [dict(zip(*series, strict=True)) for series in phases.values()]
    stacks = [_smoothed([table.get(s, 0.0) for s in steps]) for table in lookup]
    names = [key.removeprefix(SECONDS_PREFIX) for key in phases]
    colours = [PHASES[i % len(PHASES)] for i in range(len(names))]
    axis.stackplot(steps, stacks, labels=names, colors=colours, alpha=0.85, edgecolor="white", linewidth=0.4)
    axis.set_title("seconds per step, by phase")
    axis.set_xlabel("step")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[::-1], labels[::-1], fontsize=7, loc="upper right", framealpha=0.9)  # in the order stacked
    axis.set_ylim(0, 1.25 * max(sum(column) for column in zip(*stacks, strict=True)) or 1.0)


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


def _smoothed(values: list[float]) -> list[float]:
    """Exponential average without a bias towards the first value (the weights seen so far are normalised)."""
    total = weight = 0.0
    out = []
    for value in values:
        total = SMOOTHING * total + value
        weight = SMOOTHING * weight + 1.0
        out.append(total / weight)
    return out


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
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

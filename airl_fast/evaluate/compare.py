"""Finished runs side by side: what differs in their configurations, and what each reached.

Runs that differ in nothing but the seed are one row, with the mean over them. Everything is read from config.yaml and
summary.json; no model is loaded.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.evaluate.passk import Estimate
from airl_fast.evaluate.plots import BLUE, GREY, figure_of
from airl_fast.evaluate.summary import ABSENT, Summary, read_summary
from airl_fast.evaluate.tables import Grid, as_markdown, as_text, paragraph, percent, percent_value, signed_percent
from airl_fast.evaluate.tables import plain as three_decimals
from airl_fast.overrides import load_config, plain, read_yaml

# Where a run lies and what it keeps; they do not change what it computes.
NOT_COMPUTED = ("output_dir", "checkpoint_every", "keep_checkpoints", "save_rollouts_every", "tensorboard", "wandb")
# measure: what needs no reward, or no training, on the same samples
BASELINES = {"pass_at_1": "start", "rerank": "random", "localise": "chance"}
MEASURES = ("start", "pass_at_1", "random", "rerank", "chance", "localise", "auroc")
_MISSING = object()  # a key that one configuration has and another has not


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One finished run. config: its whole configuration as plain values, without what NOT_COMPUTED names."""

    name: str
    path: Path
    config: Mapping[str, Any]
    summary: Summary

    @property
    def seed(self) -> int:
        return self.summary.seed

    def estimate(self, measure: str) -> Estimate | None:
        """One of MEASURES, None where the run has no such part. `pass_at_1` is that of the run's own algorithm."""
        summary = self.summary
        return {
            "start": lambda: summary.pass_at_1.get("start"),
            "pass_at_1": lambda: summary.pass_at_1.get(self.config["algorithm"]),
            "random": lambda: summary.rerank_pass_at_1.get("random"),
            "rerank": lambda: summary.rerank_pass_at_1.get("reward"),
            "chance": lambda: summary.localise_hit_at_1.get("chance"),
            "localise": lambda: summary.localise_hit_at_1.get("reward"),
            "auroc": lambda: summary.auroc_within_prompt,
        }[measure]()


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over `runs` runs. With one, low and high are its 95% interval over prompts; with several, `value` is
    the mean and low and high are the lowest and the highest run."""

    value: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Runs that are shown as one. settings: dotted key -> value as text, for the keys in which rows differ."""

    name: str
    runs: tuple[RunRow, ...]
    settings: Mapping[str, str]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def seconds(self) -> float:
        """Mean wall clock of a run."""
        return float(np.mean([run.summary.seconds for run in self.runs]))

    def spread(self, measure: str) -> Spread | None:
        """None when no run has the part; runs without it do not count."""
        known = [estimate for run in self.runs if (estimate := run.estimate(measure)) is not None]
        if len(known) == 1:
            return Spread(known[0].value, known[0].low, known[0].high, 1)
        return _over_runs([estimate.value for estimate in known])

    def difference(self, base: "Row", measure: str) -> Spread | None:
        """This row minus another. Over seeds that both have: the mean of the differences seed by seed, the lowest and
        the highest.

        With one such seed the interval is made from those of the two figures as if their prompts were independent
        (MOVER; Zou & Donner 2008): on the same prompts it is too wide rather than too narrow. None without a common
        seed.
        """
        ours, theirs = ({run.seed: run.estimate(measure) for run in row.runs} for row in (self, base))
        pairs = [(ours[seed], theirs.get(seed)) for seed in ours]
        pairs = [(a, b) for a, b in pairs if a is not None and b is not None]
        if len(pairs) != 1:
            return _over_runs([a.value - b.value for a, b in pairs])
        a, b = pairs[0]
        value = a.value - b.value
        down = np.hypot(a.value - a.low, b.high - b.value)
        up = np.hypot(a.high - a.value, b.value - b.low)
        return Spread(value, float(value - down), float(value + up), 1)


def read_runs(paths: Sequence[Path], split: str | None = None) -> tuple[RunRow, ...]:
    """The runs in these directories, in the order given. split: take the figures that `airl-fast eval` wrote for it, in
    place of those the run ended with.

    UserError names a directory that is no run, is unfinished, or is given twice.
    """
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise UserError(f"{path} is given twice; name every run once.")
        seen.add(path.resolve())
    names = _names(paths)
    return tuple(_read_run(path, name, split) for path, name in zip(paths, names, strict=True))


def aggregate(runs: Sequence[RunRow], *, by_seed: bool = False) -> tuple[Row, ...]:
    """Runs of one configuration but for the seed as one row each, in the order of their first runs. by_seed: a row for
    every run.

    A path that holds the run's own seed ("starts/main-seed1") differs with the seed alone.
    """
    if by_seed:
        groups, trees = [[run] for run in runs], [run.config for run in runs]
    else:
        groups, trees = [], []
        for run in runs:
            tree = _without_seed(run)
            if tree in trees:
                groups[trees.index(tree)].append(run)
            else:
                trees.append(tree)
                groups.append([run])
    keys = list(_differing(trees))
    names = [_common_name(group) for group in groups]
    taken = {name for name in names if names.count(name) > 1}
    return tuple(
        Row(
            name=group[0].name if name in taken else name,
            runs=tuple(group),
            settings={key: _shown(_at(tree, key)) for key in keys},
        )
        for name, group, tree in zip(names, groups, trees, strict=True)
    )


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


def _read_run(path: Path, name: str, split: str | None) -> RunRow:
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is no run directory (it has no config.yaml); give one that `airl-fast train` wrote.")
    file = path / "summary.json" if split is None else path / "eval" / f"{split}.json"
    if not file.is_file() and split is not None:
        raise UserError(f"{path} has no figures for {split}; make them with `airl-fast eval {path} --split {split}`.")
    if not file.is_file():
        raise UserError(
            f"{path} has no summary.json: the run is unfinished (continue it with --resume auto), or it was not "
            "evaluated (run `airl-fast eval` on it and compare with --split test)."
        )
    config = plain(load_config(Config, read_yaml(path / "config.yaml"), [], origin=str(path / "config.yaml")))
    kept = {key: value for key, value in config.items() if key not in NOT_COMPUTED}
    return RunRow(name=name, path=path, config=kept, summary=read_summary(file))


def _names(paths: Sequence[Path]) -> list[str]:
    """The directories' own names, with as many parents as it takes to tell them apart."""
    parts = [path.resolve().parts[1:] for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _common_name(group: Sequence[RunRow]) -> str:
    """What the names of runs share when their seeds are left out."""
    if len(group) == 1:
        return group[0].name
    bare = [re.sub(rf"[-_.]?(?:seed|s)[-_=]?{run.seed}(?!\d)", "", run.name) for run in group]
    shared = os.path.commonprefix(bare).rstrip("-_./")
    return shared if len(shared) > 1 else f"{group[0].name} and {len(group) - 1} more"


def _without_seed(run: RunRow) -> dict[str, Any]:
    """The configuration with the seed, also within text, taken out."""
    pattern = re.compile(rf"(seed[-_=]?){run.config['seed']}(?!\d)")

    def bare(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: bare(each) for key, each in value.items()}
        return pattern.sub(r"\1*", value) if isinstance(value, str) else value

    return {key: bare(value) for key, value in run.config.items() if key != "seed"}


def _differing(trees: Sequence[Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys whose values are not the same in all; a section that some lack counts as one value."""
    if all(isinstance(tree, Mapping) for tree in trees):
        for key in dict.fromkeys(key for tree in trees for key in tree):
            yield from _differing([tree.get(key, _MISSING) for tree in trees], f"{prefix}{key}.")
    elif any(tree != trees[0] for tree in trees):
        yield prefix.removesuffix(".")


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part, _MISSING)
    return tree


def _shown(value: Any) -> str:
    if value is _MISSING:
        return "unset"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True, sort_keys=False)
    return text.strip().removesuffix("...").strip()


def _over_runs(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(float(np.mean(values)), min(values), max(values), len(values))


# ---- what a person sees ----


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
                three_decimals(row.spread("auroc")),
            )
            for row in rows
        ),
    )


def _difference_grid(rows: Sequence[Row]) -> Grid:
    measures = ("pass_at_1", "rerank", "localise", "auroc")
    return Grid(
        headings=(f"minus {rows[0].name}", "trained pass@1", "rerank pass@1", "Hit@1", "AUROC x 100"),
        rows=tuple((row.name, *(signed_percent(row.difference(rows[0], m)) for m in measures)) for row in rows[1:]),
    )


def _notes(rows: Sequence[Row]) -> list[str]:
    chosen_from = dict.fromkeys(run.summary.rerank_n for row in rows for run in row.runs)
    chosen_from.pop(None, None)
    samples = " or ".join(map(str, chosen_from)) if chosen_from else ABSENT
    notes = [
        f"Rates in per cent. Rerank: one of {samples} samples of the start policy picked by the reward; random is a "
        "pick at random from them. Step Hit@1: the first wrong step is the one the reward names. AUROC: reward against correctness within a prompt; 0.5 is chance."
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
        notes.append(
            "Several seeds: their mean and, in brackets, the lowest and the highest; differences seed by seed."
        )
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

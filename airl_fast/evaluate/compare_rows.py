"""Finished runs side by side: what differs in their configurations, and what each reached.

Runs that differ in nothing but the seed are one row, with the mean over them. Everything is read from config.yaml and
summary.json; no model is loaded.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from airl_fast.config import Config
from airl_fast.errors import UserError
from airl_fast.evaluate.summary import Summary, read_summary
from airl_fast.measures.passk import Estimate
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
            name=_and_more(group) if name in taken else name,
            runs=tuple(group),
            settings={key: _shown(_at(tree, key)) for key in keys},
        )
        for name, group, tree in zip(names, groups, trees, strict=True)
    )


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
    words = ["model.trust_remote_code=false"]  # no model is loaded here
    config = plain(load_config(Config, read_yaml(path / "config.yaml"), words, origin=str(path / "config.yaml")))
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
    """The runs' name without their seeds, where that is one name."""
    if len(group) == 1:
        return group[0].name
    bare = {_without_number(run.name, run.seed) for run in group}
    return bare.pop() if len(bare) == 1 and "" not in bare else _and_more(group)


def _without_number(name: str, seed: int) -> str:
    """ "gamma-0-seed1" is "gamma-0", and so is "gamma-0-1"."""
    bare = re.sub(rf"[-_.]?(?:seed|s)[-_=]?{seed}(?!\d)", "", name)
    return bare if bare != name else re.sub(rf"[-_.]{seed}$", "", name)


def _and_more(group: Sequence[RunRow]) -> str:
    return group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"


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

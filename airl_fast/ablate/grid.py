"""What an ablation runs: a preset, changes for all of its runs, and variants of one change each."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from airl_fast.artifacts import START
from airl_fast.config import Config, Section
from airl_fast.errors import UserError
from airl_fast.overrides import deep_merge, find_preset, load_config, plain, read_yaml
from airl_fast.trust import TRUST

Changes = dict[str, Any]  # a tree of configuration keys
MAIN_START = "main"
_START_OF = re.compile(r"\{start:([\w-]+)\}")


class Variant(Section):
    """name: of the row. topic: what it is about; rows of a topic stand together. change: keys of the configuration."""

    name: str
    topic: str
    change: Changes = Field(default_factory=dict)


class Grid(Section):
    """The file of an ablation. base: keys that every run sets besides the preset's. starts: further start policies, as
    changes of the base; a variant names one by "{start:NAME}". The first variant is the one others are compared with.
    """

    preset: str
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2)
    base: Changes = Field(default_factory=dict)
    starts: dict[str, Changes] = Field(default_factory=dict)
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One training run. name: of its directory. tree: its configuration as plain values. variant: None for a run that
    only makes a start policy."""

    name: str
    tree: Mapping[str, Any]
    seed: int
    variant: str | None = None


def read_grid(name: str, presets: Path) -> Grid:
    """A grid of `presets`/ablations by name, or any YAML file. UserError names the key that is wrong."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = presets / "ablations" / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
            raise UserError(f"there is no ablation {name!r}; choose {known}, or give a YAML file.")
    grid = load_config(Grid, read_yaml(path), [], origin=str(path))
    for values, what in ((grid.seeds, "seeds"), ([v.name for v in grid.variants], "variants")):
        repeated = [value for value in values if list(values).count(value) > 1]
        if repeated:
            raise UserError(f"{path}: {what} holds {repeated[0]!r} twice; every run needs a name of its own.")
    return grid


def select(grid: Grid, topics: Sequence[str], seeds: Sequence[int]) -> Grid:
    """The grid with some topics and seeds only; the first variant always stays."""
    known = dict.fromkeys(variant.topic for variant in grid.variants)
    unknown = [topic for topic in topics if topic not in known]
    if unknown:
        raise UserError(f"--only {unknown[0]}: there is no such topic; choose from {', '.join(known)}.")
    chosen = [v for i, v in enumerate(grid.variants) if i == 0 or not topics or v.topic in topics]
    return grid.model_copy(update={"variants": tuple(chosen), "seeds": tuple(seeds) or grid.seeds})


def start_jobs(grid: Grid, root: Path, presets: Path, words: Sequence[str]) -> list[Job]:
    """Runs that make the start policies of every seed: those that the chosen variants use."""
    used = {name for variant in grid.variants for name in _START_OF.findall(str(variant.change))}
    unknown = sorted(used - grid.starts.keys())
    if unknown:
        raise UserError(f"a variant uses the start policy {unknown[0]!r}, which the grid's `starts` does not make.")
    jobs = []
    for seed in grid.seeds:
        for name, change in {MAIN_START: {}, **{n: c for n, c in grid.starts.items() if n in used}}.items():
            tree = _tree(grid, presets, words, seed, change)
            if not tree["warm_start"]["updates"] and name == MAIN_START:
                continue  # it is the model given
            # One step of the cheapest algorithm, for the sake of the start policy that a run begins by making.
            tree = deep_merge(tree, {"algorithm": "sft", "steps": 1, "evaluate": {"final": False, "baselines": []}})
            jobs.append(Job(name=_start_name(name, seed), tree=_in(tree, root / "starts"), seed=seed))
    return jobs


def run_jobs(grid: Grid, root: Path, presets: Path, words: Sequence[str]) -> list[Job]:
    """A run of every variant on every seed, seed by seed, from the start policies that `start_jobs` make."""
    jobs = []
    for seed in grid.seeds:
        for variant in grid.variants:
            change = _with_starts(variant.change, root, seed)
            tree = _tree(grid, presets, words, seed, change)
            if tree["warm_start"]["updates"]:
                tree["model"] |= {"path": str(_start(root, MAIN_START, seed)), "build": None}
                tree["warm_start"]["updates"] = 0
            name = f"{slug(variant.name)}-seed{seed}"
            jobs.append(Job(name=name, tree=_in(tree, root), seed=seed, variant=variant.name))
    return jobs


def slug(name: str) -> str:
    """A variant's name as that of a directory."""
    named = name.replace("γ", "gamma").replace("%", "-percent")
    return re.sub(r"[^a-z0-9.]+", "-", named.lower()).strip("-")


def _tree(grid: Grid, presets: Path, words: Sequence[str], seed: int, change: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration, validated: preset, grid's base, the command line's words, the change, the seed."""
    source, origin = find_preset(grid.preset, presets)
    config = load_config(Config, deep_merge(source, grid.base), words, origin=f"{origin} with the grid's base")
    tree = deep_merge(deep_merge(plain(config), change), {"seed": seed})
    return plain(load_config(Config, tree, [TRUST] if config.model.trust_remote_code else [], origin=f"{change}"))


def _in(tree: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    return deep_merge(tree, {"output_dir": str(directory)})


def _with_starts(change: Any, root: Path, seed: int) -> Any:
    """The change with every "{start:NAME}" replaced by the directory of that start policy."""
    if isinstance(change, Mapping):
        return {key: _with_starts(value, root, seed) for key, value in change.items()}
    if isinstance(change, str):
        return _START_OF.sub(lambda match: str(_start(root, match[1], seed)), change)
    return change


def _start(root: Path, name: str, seed: int) -> Path:
    return (root / "starts" / _start_name(name, seed) / START).resolve()


def _start_name(name: str, seed: int) -> str:
    return f"{name}-seed{seed}"

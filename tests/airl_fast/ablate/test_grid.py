"""Which runs an ablation consists of, and what a wrong grid is told."""

from pathlib import Path

import pytest

from airl_fast.ablate.grid import Grid, read_grid, run_jobs, select, slug, start_jobs
from airl_fast.commands.settings import PRESETS
from airl_fast.errors import UserError

GRID = """
preset: tiny
seeds: [3, 5]
base: {steps: 7}
starts: {small: {model: {build: {layers: 1}}}, unused: {model: {build: {layers: 2}}}}
variants:
  - {name: base, topic: base}
  - {name: γ = 0, topic: discount, change: {advantage: {gamma: 0.0}}}
  - {name: small D, topic: size, change: {discriminator: {path: "{start:small}"}}}
"""


def grid(tmp_path: Path, text: str = GRID) -> Grid:
    (tmp_path / "grid.yaml").write_text(text)
    return read_grid(str(tmp_path / "grid.yaml"), PRESETS)


def test_every_variant_runs_on_every_seed_with_its_one_change(tmp_path: Path) -> None:
    jobs = run_jobs(grid(tmp_path), tmp_path, PRESETS, ["policy.epochs=2"])
    assert [job.name for job in jobs] == [
        "base-seed3", "gamma-0-seed3", "small-d-seed3", "base-seed5", "gamma-0-seed5", "small-d-seed5",
    ]  # fmt: skip
    base, discount, size = jobs[:3]
    assert base.tree["steps"] == 7 and base.tree["policy"]["epochs"] == 2 and base.tree["seed"] == 3
    assert base.tree["model"]["path"] == str(tmp_path.resolve() / "starts/main-seed3/start")
    assert base.tree["model"]["build"] is None and base.tree["warm_start"]["updates"] == 0
    assert discount.tree == base.tree | {"advantage": base.tree["advantage"] | {"gamma": 0.0}}
    path = str(tmp_path.resolve() / "starts/small-seed3/start")
    assert size.tree == base.tree | {"discriminator": base.tree["discriminator"] | {"path": path}}


def test_start_policies_are_those_that_are_used(tmp_path: Path) -> None:
    jobs = start_jobs(grid(tmp_path), tmp_path, PRESETS, [])
    assert [job.name for job in jobs] == ["main-seed3", "small-seed3", "main-seed5", "small-seed5"]
    main, small = jobs[:2]
    assert main.tree["warm_start"]["updates"] == 600 and main.tree["algorithm"] == "sft" and main.tree["steps"] == 1
    assert (main.tree["model"]["build"]["layers"], small.tree["model"]["build"]["layers"]) == (3, 1)
    chosen = select(grid(tmp_path), ["discount"], [1])
    assert [job.name for job in start_jobs(chosen, tmp_path, PRESETS, [])] == ["main-seed1"]
    assert [job.name for job in run_jobs(chosen, tmp_path, PRESETS, [])] == ["base-seed1", "gamma-0-seed1"]


def test_a_given_model_needs_no_start_policy(tmp_path: Path) -> None:
    words = ["model={path: /models/mine, build: null}", "warm_start.updates=0"]
    chosen = select(grid(tmp_path), ["discount"], [])
    assert start_jobs(chosen, tmp_path, PRESETS, words) == []
    assert {job.tree["model"]["path"] for job in run_jobs(chosen, tmp_path, PRESETS, words)} == {"/models/mine"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("preset: tiny", "preset: tniy"), "tniy"),
        (("seeds: [3, 5]", "seeds: [3, 3]"), "seeds holds 3 twice"),
        (("seeds: [3, 5]", "seeds: []"), "seeds"),
        (("name: small D", "name: base"), "variants holds 'base' twice"),
        (("gamma: 0.0", "gama: 0.0"), "advantage.gama"),
        (("gamma: 0.0", "gamma: 3.0"), "advantage.gamma"),
        (("start:small", "start:tiny"), "'tiny', which the grid's `starts` does not make"),
        (("topic: size", "topics: size"), "topics"),
    ],
)
def test_a_wrong_grid_gets_a_sentence(tmp_path: Path, change: tuple[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        wrong = grid(tmp_path, GRID.replace(*change))
        start_jobs(wrong, tmp_path, PRESETS, [])
        run_jobs(wrong, tmp_path, PRESETS, [])


def test_names_of_grids_and_topics(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no ablation 'tniy'; choose tiny"):
        read_grid("tniy", PRESETS)
    with pytest.raises(UserError, match="--only los: .* choose from base, discount, size"):
        select(grid(tmp_path), ["los"], [])
    assert slug("γ = 0.99") == "gamma-0.99" and slug("30% wrong experts") == "30-percent-wrong-experts"


def test_the_grid_of_the_paper_covers_what_it_argues_from() -> None:
    tiny = read_grid("tiny", PRESETS)
    assert len(tiny.seeds) == 3 and len({slug(variant.name) for variant in tiny.variants}) == len(tiny.variants)
    jobs = run_jobs(tiny, Path("x"), PRESETS, [])
    own = {variant.name for variant in tiny.variants if variant.topic == "own settings"}
    first = {job.variant: job.tree for job in jobs if job.seed == 0}
    trees, tuned = ({name: tree for name, tree in first.items() if (name in own) == held} for held in (False, True))
    base = trees["base"]
    for keys, values in {
        ("discriminator", "perturbed_per_expert"): {0, 2},
        ("discriminator", "loss"): {"bce", "wgan"},
        ("reward", "granularity"): {"dense", "interval", "sparse", "multiscale"},
        ("policy", "expert_in_policy"): {"none", "one", "balanced"},
        ("discriminator", "head"): {"action", "linear", "logprob"},
        ("discriminator", "updates_per_step"): {0, 1},
    }.items():
        section, key = keys
        assert {tree[section][key] for tree in trees.values()} == values
        assert base[section][key] in values
    assert len({tree["advantage"]["gamma"] for tree in trees.values()}) == 5
    assert {tree["data"]["options"].get("expert_error_rate", 0.0) for tree in trees.values()} == {0.0, 0.1, 0.3}
    assert len({tree["discriminator"]["path"] for tree in trees.values()}) == 3
    assert {tree["reward"]["granularity"] for tree in tuned.values()} == {"dense", "interval", "sparse", "multiscale"}
    assert {tree["discriminator"]["loss"] for tree in tuned.values()} == {"bce", "wgan"}

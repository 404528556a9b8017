"""A small ablation from its command: trained, continued, tabulated; a run that fails does not take others along."""

import json
from pathlib import Path

import numpy as np
import pytest

from airl_fast.ablate.grid import Variant
from airl_fast.ablate.table import Outcome, Row, draw, read_outcome, render, write_json
from airl_fast.cli import main
from airl_fast.evaluate.summary import read_summary
from tests.airl_fast.run_cases import EASY

GRID = """
preset: tiny
seeds: [0]
base: {steps: 2, checkpoint_every: 2, evaluate: {baselines: []}, warm_start: {updates: 40, batch_size: 16}}
variants:
  - {name: base, topic: base}
  - {name: no perturbations, topic: data, change: {discriminator: {perturbed_per_expert: 0}}}
  - {name: nowhere, topic: size, change: {discriminator: {path: /nowhere/at/all}}}
"""


def test_an_ablation_from_its_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "grid.yaml").write_text(GRID)
    command = ["ablate", str(tmp_path / "grid.yaml"), *EASY, "-o", str(tmp_path / "out")]
    assert main(command) == 1  # one of its runs failed
    said = capsys.readouterr().out
    assert "3 runs: 3 variants on seeds 0" in said and "nowhere-seed0: failed, see" in said
    assert "nowhere: no result for seed 0." in said
    assert "/nowhere/at/all" in (tmp_path / "out" / "nowhere-seed0.log").read_text()
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    for row in table["rows"][:2]:
        summary = read_summary(tmp_path / "out" / f"{row['name'].replace(' ', '-')}-seed0" / "summary.json")
        assert row["pass_at_1"] == [summary.pass_at_1["airl"].value]
        assert row["localise"] == [summary.localise_hit_at_1["reward"].value]
    first, second = (row["pass_at_1"][0] for row in table["rows"][:2])
    assert table["rows"][1]["difference"]["pass_at_1"] == pytest.approx([second - first])
    assert table["rows"][2]["failed"] == [0] and table["rows"][2]["pass_at_1"] == [None]
    assert (tmp_path / "out" / "figure.png").stat().st_size > 10_000

    trained = (tmp_path / "out" / "base-seed0" / "metrics.jsonl").stat().st_mtime_ns
    assert main([*command, "--only", "data"]) == 0  # what is there is not trained again
    assert "2 of 2 runs are there already" in capsys.readouterr().out
    assert (tmp_path / "out" / "base-seed0" / "metrics.jsonl").stat().st_mtime_ns == trained
    assert main([*command, "--only", "data", "advantage.gamma=0.3"]) == 2
    assert "holds a run of another configuration; choose another directory" in capsys.readouterr().err


def outcome() -> Outcome:
    seeds = (0, 1, 2)
    rows = [
        Row(name="base", topic="base", seeds=seeds, failed=(), values={
            "pass_at_1": (0.8, 0.9, 1.0), "rerank": (0.5, 0.5, 0.5), "localise": (0.25, 0.5, 0.75),
        }),
        Row(name="other [x]", topic="one", seeds=seeds, failed=(2,), values={
            "pass_at_1": (0.7, 0.6, None), "rerank": (None, None, None), "localise": (0.3, 0.3, None),
        }),
    ]  # fmt: skip
    return Outcome(rows=tuple(rows), floor={"pass_at_1": 0.4, "rerank": None, "localise": 0.2})


def test_the_table_pairs_seeds_and_shows_what_is_missing(tmp_path: Path) -> None:
    text = render(outcome())
    lines = {line.split("  ")[0]: line for line in text.splitlines() if line}
    assert "90.0 [80, 100]" in lines["base"] and "50.0 [25, 75]" in lines["base"]
    assert "65.0 [60, 70]" in lines["other [x]"]
    assert "-20.0 [-30, -10]" in lines["other [x]"]  # seeds 0 and 1 alone: 0.7-0.8 and 0.6-0.9
    assert lines["other [x]"].count("–") == 1 and "other [x]: no result for seed 2." in text
    assert lines["without a reward"].split()[3:] == ["40.0", "–", "20.0"]
    assert max(map(len, text.splitlines())) <= 100
    write_json(tmp_path / "table.json", outcome())
    row = json.loads((tmp_path / "table.json").read_text())["rows"][1]
    assert np.allclose(row["difference"]["pass_at_1"], [-0.1, -0.3]) and row["failed"] == [2]
    draw(tmp_path / "figure.png", outcome())
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_an_ablation_without_results_has_an_empty_table() -> None:
    empty = read_outcome([Variant(name="base", topic="base")], [])
    assert empty.floor["pass_at_1"] is None and "base" in render(empty)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "1,1"], "--seeds 1,1: give different whole numbers"),
        (["--seeds", "a"], "--seeds a: give different whole numbers"),
        (["--processes", "0"], "--processes 0: give a whole number from 1"),
        (["advantage.gama=1"], "advantage.gama"),
        (["--only", "nothing"], "--only nothing: there is no such topic"),
    ],
)
def test_mistakes_get_a_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["ablate", "tiny", *words]) == 2
    assert sentence in capsys.readouterr().err

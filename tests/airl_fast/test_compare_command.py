"""`airl-fast compare`: rows, means over seeds, differences and what is refused. Nothing is trained here but once."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from airl_fast.cli import main
from airl_fast.evaluate.compare import Row, aggregate, figure, read_runs, render
from airl_fast.evaluate.summary import Summary, write_summary
from airl_fast.measures.passk import Estimate
from tests.airl_fast.run_cases import small_run


def a_run(root: Path, name: str, seed: int, rate: float, changes: dict | None = None, **parts: object) -> Path:
    """A run directory with one figure, pass@1 = rate ± 0.05, of the configuration with these changes."""
    run = root / name
    run.mkdir(parents=True)
    tree = {"seed": seed, "output_dir": str(root), "model": {"build": {}}, **(changes or {})}
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    pass_at_1 = {"start": Estimate(0.4, 0.3, 0.5), "airl": Estimate(rate, rate - 0.05, rate + 0.05)}
    summary = Summary(pass_at_1=pass_at_1, seconds=100.0 + seed, peak_rss_gib=1.0, seed=seed, **parts)
    write_summary(run / "summary.json", summary)
    return run


def the_rows(*paths: Path, **options: bool) -> tuple[Row, ...]:
    return aggregate(read_runs(paths), **options)


def test_runs_that_differ_in_the_seed_alone_are_one_row(tmp_path: Path) -> None:
    paths = [a_run(tmp_path, f"base-seed{seed}", seed, rate) for seed, rate in enumerate((0.7, 0.8, 0.9))]
    (row,) = the_rows(*paths)
    assert (row.name, row.seeds, dict(row.settings), row.seconds) == ("base", (0, 1, 2), {}, 101.0)
    spread = row.spread("pass_at_1")
    assert (spread.value, spread.low, spread.high, spread.runs) == pytest.approx((0.8, 0.7, 0.9, 3))
    assert [each.name for each in the_rows(*paths, by_seed=True)] == ["base-seed0", "base-seed1", "base-seed2"]
    assert [dict(row.settings) for row in the_rows(*paths, by_seed=True)] == [{"seed": str(s)} for s in range(3)]


def test_a_start_policy_named_by_the_seed_is_no_difference(tmp_path: Path) -> None:
    starts = [{"model": {"path": f"starts/main-seed{seed}/start"}} for seed in (0, 1, 10)]
    paths = [a_run(tmp_path, f"v-seed{s}", s, 0.5, start) for s, start in zip((0, 1, 10), starts, strict=True)]
    assert [row.seeds for row in the_rows(*paths)] == [(0, 1, 10)]
    other = a_run(tmp_path, "w-seed0", 0, 0.5, {"model": {"path": "starts/other-seed0/start"}})
    assert [row.seeds for row in the_rows(*paths, other)] == [(0, 1, 10), (0,)]


def test_only_keys_that_differ_are_shown_and_where_a_run_lies_is_none(tmp_path: Path) -> None:
    first = a_run(tmp_path / "one", "a", 0, 0.5)
    second = a_run(tmp_path / "two", "b", 0, 0.5, {"advantage": {"gamma": 0.5}, "checkpoint_every": 7})
    third = a_run(tmp_path / "two", "c", 0, 0.5, {"model": {"build": {}, "lora": {"rank": 8}}})
    rows = the_rows(first, second, third)
    assert [row.settings["advantage.gamma"] for row in rows] == ["0.9", "0.5", "0.9"]
    assert rows[0].settings.keys() == {"advantage.gamma", "model.lora"}
    assert rows[0].settings["model.lora"] == "null" and "rank: 8" in rows[2].settings["model.lora"]
    table = render(rows)
    (line,) = [line for line in table.splitlines() if line.startswith("b ") and "gamma" in line]
    assert line.split(maxsplit=1) == ["b", "advantage.gamma=0.5"]
    assert max(map(len, table.splitlines())) <= 100


def test_differences_are_taken_seed_by_seed(tmp_path: Path) -> None:
    base = [a_run(tmp_path, f"base-seed{s}", s, rate) for s, rate in enumerate((0.5, 0.7))]
    more = {"advantage": {"gamma": 0.5}}
    other = [a_run(tmp_path, f"other-seed{s}", s, rate, more) for s, rate in ((1, 0.8), (0, 0.8), (5, 0.1))]
    first, second = the_rows(*base, *other)
    found = second.difference(first, "pass_at_1")
    assert (found.value, found.low, found.high, found.runs) == pytest.approx(
        (0.2, 0.1, 0.3, 2)
    )  # seed 5 has no partner
    assert second.difference(first, "rerank") is None


def test_the_difference_of_two_single_runs_has_an_interval_of_both(tmp_path: Path) -> None:
    first = a_run(tmp_path, "a", 0, 0.5)
    second = a_run(tmp_path, "b", 0, 0.75, {"steps": 3})
    base, row = the_rows(first, second)
    found = row.difference(base, "pass_at_1")
    half = (0.05**2 + 0.05**2) ** 0.5
    assert (found.value, found.low, found.high) == pytest.approx((0.25, 0.25 - half, 0.25 + half))


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run, partial = small_run(), a_run(tmp_path, "partial", 3, 0.25, {"algorithm": "airl"})
    document, picture = tmp_path / "table.json", tmp_path / "forest.png"
    words = ["compare", str(run), str(partial), "--json", str(document), "--png", str(picture)]
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    rows = json.loads(document.read_text())["rows"]
    summary = json.loads((run / "summary.json").read_text())
    assert rows[0]["figures"]["pass_at_1"]["value"] == summary["pass_at_1"]["airl"]
    assert rows[0]["figures"]["rerank"]["value"] == summary["rerank_pass_at_1"]["reward"]
    assert rows[0]["figures"]["localise"]["value"] == summary["localise_hit_at_1"]["reward"]
    assert rows[1]["figures"]["rerank"] is None and rows[1]["difference"]["pass_at_1"] is None  # other seeds
    assert rows[0]["difference"] is None and rows[0]["seconds"] == summary["seconds"]
    assert f"{100 * summary['pass_at_1']['airl']:.1f} [" in said and "25.0 [20.0, 30.0]" in said
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert main([*words[:3], "--markdown"]) == 0
    assert "| partial | 3 | 40.0 [30.0, 50.0] | 25.0 [20.0, 30.0] | 103 |" in capsys.readouterr().out


def test_the_figure_has_a_panel_a_measure_and_a_dot_a_seed(tmp_path: Path) -> None:
    paths = [a_run(tmp_path, f"base-seed{seed}", seed, rate) for seed, rate in enumerate((0.7, 0.8, 0.9))]
    drawn = figure(the_rows(*paths))
    assert len(drawn.axes) == 4
    dots = next(line for line in drawn.axes[0].lines if line.get_marker() == "o")
    assert list(dots.get_xdata()) == pytest.approx([70.0, 80.0, 90.0])


def test_the_figures_of_another_split(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = a_run(tmp_path, "a", 0, 0.5)
    assert main(["compare", str(run), "--split", "dev"]) == 2
    assert capsys.readouterr().err == (
        f"airl-fast: {run} has no figures for dev; make them with `airl-fast eval {run} --split dev`.\n"
    )
    (run / "eval").mkdir()
    shutil.copy(a_run(tmp_path, "b", 0, 0.9) / "summary.json", run / "eval" / "dev.json")
    assert main(["compare", str(run), "--split", "dev"]) == 0
    assert "90.0 [85.0, 95.0]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{root}/nothing"], "nothing is no run directory (it has no config.yaml)"),
        (["{root}/half"], "half has no summary.json: the run is unfinished"),
        (["{root}/good", "{root}/../{name}/good"], "good is given twice; name every run once."),
        (["{root}/good", "--png", "{root}/figure.gif"], "figure.gif: the name must end in .png."),
        (["{root}/good", "--json", "{root}/no/table.json"], "give the name of a file in a directory that exists."),
    ],
)
def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], expected: str) -> None:
    a_run(tmp_path, "good", 0, 0.5)
    (a_run(tmp_path, "half", 0, 0.5) / "summary.json").unlink()
    assert main(["compare", *(word.format(root=tmp_path, name=tmp_path.name) for word in words)]) == 2
    told = capsys.readouterr()
    assert expected in told.err and told.err.count("\n") == 1 and told.out == ""

"""What a report shows is what the run directory holds, and a directory that does not fit is refused in a sentence."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from airl_kernels import group_advantages

from airl_fast.cli import main
from airl_fast.errors import UserError
from airl_fast.evaluate.record import read_record, record_path, write_record
from airl_fast.report import page
from airl_fast.report.curves import curve_panels, time_panels
from airl_fast.report.figures import evaluation_panels
from airl_fast.report.runs import read_runs, run_names
from airl_fast.report.tables import differing_settings, summary_groups
from airl_fast.report.tokens import group_statistics, token_views
from tests.airl_fast.report.report_cases import CORRELATION, HOSTILE, PHASES, STEPS, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list:
    root = tmp_path_factory.mktemp("runs")
    return read_runs([write_run(root, "one"), write_run(root, "two", gamma=0.5)], "test")


def by_id(panels: list) -> dict:
    return {panel.id: panel for panel in panels}


# ---------------------------------------------------------------------------------------------- figures


def test_curves_hold_every_logged_step_of_every_run(runs) -> None:
    panels = by_id(curve_panels(runs))
    names = {"reward-gap", "accuracy", "sample-pass-at-1", "mean-length", "entropy", "mismatch-kl"}
    assert panels.keys() == {f"curve-{name}" for name in names}
    for panel in panels.values():
        assert [trace.name for trace in panel.figure.data] == ["one", "one", "two", "two"]
        assert all(len(trace.x) == len(trace.y) == STEPS for trace in panel.figure.data)
    assert panels["curve-reward-gap"].figure.data[0].y[3] == 0.25
    assert panels["curve-sample-pass-at-1"].figure.data[0].y[-1] == 100.0  # per cent
    assert panels["curve-mismatch-kl"].figure.data[0].y[1] == 2e-13  # small, and not rounded to nothing
    assert panels["curve-accuracy"].figure.layout.shapes[0].y0 == 50


def test_phases_are_stacked_to_the_seconds_of_a_step(runs) -> None:
    panels = by_id(time_panels(runs))
    assert panels.keys() == {"phases-0", "phases-1", "throughput"}
    phases = panels["phases-0"].figure.data
    assert {trace.name: trace.y[0] for trace in phases} == {"sample": 0.25, "policy": 0.5}
    assert {trace.stackgroup for trace in phases} == {"phases"}
    assert sum(trace.y[-1] for trace in phases) == sum(PHASES.values())


def test_a_long_run_is_thinned_out_and_keeps_its_shape(runs) -> None:
    steps = list(range(1, 10_001))
    long = runs[0].__class__(**{f: getattr(runs[0], f) for f in runs[0].__dataclass_fields__} | {
        "metrics": {"policy/entropy": (steps, [1.0 / s for s in steps])}})  # fmt: skip
    (panel,) = curve_panels([long])
    raw = panel.figure.data[0]
    assert len(raw.x) == 2000 and list(raw.x[:2]) == [1, 6] and raw.y[1] == pytest.approx(1 / 6, rel=1e-5)


def test_pass_at_k_has_a_line_and_a_band_for_every_policy(runs) -> None:
    figure = by_id(evaluation_panels(runs[:1]))["pass-at-k"].figure
    lines = {trace.name: trace for trace in figure.data if not trace.fill}
    bands = {trace.name: trace for trace in figure.data if trace.fill}
    assert lines.keys() == {"start policy", "AIRL"} and bands.keys() == {"start policy [95%]", "AIRL [95%]"}
    assert list(lines["start policy"].x) == [1, 2, 5]
    assert list(lines["start policy"].y) == pytest.approx([42, 44, 50])
    assert list(bands["start policy [95%]"].x) == [1, 2, 5, 5, 2, 1]
    assert list(bands["start policy [95%]"].y) == pytest.approx([47, 49, 55, 45, 39, 37])


def test_reranking_is_overlaid_by_run_and_what_is_hidden_can_be_shown(runs) -> None:
    figure = by_id(evaluation_panels(runs))["rerank"].figure
    lines = {trace.name: trace for trace in figure.data if not trace.fill}
    assert lines.keys() == {f"{r}: {n}" for r in ("one", "two") for n in ("learned reward", "random", "oracle")}
    assert lines["two: learned reward"].visible is True and lines["two: oracle"].visible == "legendonly"
    assert len({trace.line.dash for name, trace in lines.items() if name.startswith("one")}) == 3
    alone = by_id(evaluation_panels(runs[:1]))["rerank"].figure
    assert {trace.name for trace in alone.data if not trace.fill} >= {"reward mean", "oracle"}


def test_distributions_count_every_sample_and_say_how_far_apart_they_are(runs) -> None:
    panel = by_id(evaluation_panels(runs[:1]))["distribution-0"]
    reward = runs[0].record.reward
    correct, wrong = panel.figure.data
    assert (sum(correct.customdata), sum(wrong.customdata)) == (sum(reward.correct), 20 - sum(reward.correct))
    assert sum(correct.y) == pytest.approx(100) and sum(wrong.y) == pytest.approx(100, abs=1e-2)
    lines = [shape.x0 for shape in panel.figure.layout.shapes]
    values, right = np.array(reward.rewards), np.array(reward.correct)
    assert lines == pytest.approx([values[right].mean(), values[~right].mean()])
    for words in ("Welch t = 5.12 with 17 degrees", "AUROC within a prompt 0.800 [0.750, 0.850]", "pooled 0.850"):
        assert words in panel.caption


def test_correlations_leave_out_what_never_varies(runs) -> None:
    panel = by_id(evaluation_panels(runs[:1]))["correlation-0"]
    (heatmap,) = panel.figure.data
    assert [list(row) for row in heatmap.z] == [row[:3] for row in CORRELATION[:3]]
    assert list(heatmap.x) == ["learned reward", "mean log-probability", "correct"]
    assert "never vary: ended its turn" in panel.caption


def test_localisation_has_intervals_and_chance(runs) -> None:
    panels = by_id(evaluation_panels(runs))
    figure = panels["localise-hit-at-1"].figure
    for bars in figure.data:
        assert dict(zip(bars.y, bars.x, strict=True)) == {
            "reward, first below": 90, "log-prob., first below": 60, "reward, argmin": 80,
        }  # fmt: skip
        assert list(bars.error_x.array) == pytest.approx([5, 5, 5])
    assert [shape.x0 for shape in figure.layout.shapes] == [20, 30, 20, 30]
    assert [shape.line.dash for shape in figure.layout.shapes] == ["dash", "dot"] * 2
    assert list(panels["localise-mrr"].figure.data[0].x) == pytest.approx([91, 61, 81])


# ---------------------------------------------------------------------------------------------- tables and tokens


def test_the_summary_has_a_column_for_every_run(runs) -> None:
    groups = dict(summary_groups(runs))
    assert list(groups) == [
        "Policy, pass@1", "Policy, pass@5", "Start policy's samples picked by, pass@1|5",
        "First wrong step named by, Hit@1", "Reward and correctness", "The run",
    ]  # fmt: skip
    start, airl = groups["Policy, pass@1"]
    assert (airl.label, [cell.text for cell in airl.cells]) == ("AIRL", ["90.0%", "90.0%"])
    assert start.cells[0].interval == "[45.0, 55.0]" and start.cells[0].strip == pytest.approx((50, 45, 55))
    assert [row.cells[1].text for row in groups["The run"]] == ["12", "0.75", "0", "4"]


def test_settings_that_differ_are_named_and_where_a_run_lies_is_not_one(runs) -> None:
    assert differing_settings(runs) == [("advantage.gamma", ("0.9", "0.5"))]
    assert differing_settings(runs[:1]) == []


def test_names_are_as_long_as_needed() -> None:
    assert run_names([Path("/a/demo"), Path("/b/other")]) == ["demo", "other"]
    assert run_names([Path("/a/demo"), Path("/b/demo")]) == ["a/demo", "b/demo"]


def test_group_statistics_standardise_as_training_does(runs) -> None:
    record, traces = runs[0].record, [t for t in runs[0].traces if t.kind == "sample"]
    packed = torch.tensor([r for t in traces for r in t.reward], dtype=torch.float64)
    ends = torch.tensor(np.cumsum([0] + [len(t.reward) for t in traces]), dtype=torch.int32)
    group = torch.tensor([t.prompt for t in traces])
    wanted = group_advantages(packed, ends, group, 0.0, eps=1e-6, min_std=0.1)
    view = token_views(runs)[0]
    got = [
        (r - view["prompts"][t.prompt]["mean"]) / view["prompts"][t.prompt]["scale"] for t in traces for r in t.reward
    ]
    assert got == pytest.approx(wanted.tolist(), abs=1e-9)
    assert view["promptsTotal"] == record.prompts_total == 6


@pytest.mark.parametrize(("last", "expected"), [([2.0], (2.0, None)), ([1.0, 1.0], (1.0, 0.100001))])
def test_a_group_without_a_spread(runs, last, expected) -> None:
    assert group_statistics(last, runs[0].record.reward) == expected


# ---------------------------------------------------------------------------------------------- the page


def test_no_text_of_a_trace_can_end_the_script_that_holds_it(runs) -> None:
    html = page.render(runs[:1])
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    assert "<" not in data
    assert HOSTILE in json.loads(data)["views"][0]["traces"][0]["text"]
    assert HOSTILE not in html and "<img src=x" not in html


def test_the_page_asks_the_network_for_nothing_and_names_its_scripts_by_hash(runs) -> None:
    html = page.render(runs[:1])
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', html)[1].replace("&#39;", "'")
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "unsafe-inline'; img-src data:" in policy
    assert (
        policy.count("'sha256-") == html.count("<script>") == 5
        and "unsafe-eval" not in policy
        and "script-src 'unsafe" not in policy
    )
    markup = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert re.findall(r'<[^>]*\b(?:src|href)="(?!#|data:,)', markup) == []


def test_the_command_writes_beside_the_run_and_says_what_is_missing(tmp_path, capsys) -> None:
    run = write_run(tmp_path, "bare")
    record_path(run, "test").unlink()
    assert main(["report", str(run)]) == 0
    said = capsys.readouterr().out
    sentence = (
        "bare has no recorded traces, so its pass@k curves, rewards and tokens are not shown: "
        f"run `airl-fast eval {run}`."
    )
    assert sentence in said and f"{run}/report.html: 1 run(s), 0 traces" in said
    html = (run / "report.html").read_text()
    assert sentence in html.replace("&#39;", "'") and 'id="tokens"' not in html and "plot-curve-entropy" in html


def test_a_run_that_was_not_evaluated_still_has_curves(tmp_path, capsys) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").unlink()
    assert main(["report", str(run), "-o", str(tmp_path / "r.html")]) == 0
    assert f"one has no figures on its test prompts yet: run `airl-fast eval {run}`." in capsys.readouterr().out
    assert "plot-curve-entropy" in (tmp_path / "r.html").read_text()


def damage(run: Path, file: str, content: bytes | None) -> None:
    path = run / file
    path.unlink() if content is None else path.write_bytes(content)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, "is no run directory (it has no config.yaml); give one that `airl-fast train` wrote."),
        ("metrics.jsonl", None, "is no run directory (it has no metrics.jsonl)"),
        ("metrics.jsonl", b"{\n{}\n", "metrics.jsonl line 1 is not a JSON object"),
        ("metrics.jsonl", b"\xff\xfe", "metrics.jsonl is not UTF-8 text"),
        ("config.yaml", b"a: [", "config.yaml, line 1: this is not valid YAML"),
        ("summary.json", b"{}", "summary.json lacks the key"),
        ("eval/traces-test.jsonl.gz", b"no gzip", "traces-test.jsonl.gz is damaged or no gzip file; run `airl-fast ev"),
    ],
)
def test_damaged_files_are_named(tmp_path, capsys, file, content, message) -> None:
    run = write_run(tmp_path)
    damage(run, file, content)
    assert main(["report", str(run), "-o", str(tmp_path / "r.html")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_wrong_arguments(tmp_path, capsys) -> None:
    run = write_run(tmp_path)
    for words, message in (
        ([str(run), str(run)], f"{run} is given twice"),
        ([str(run), "-o", str(tmp_path)], "give the name of a file in a directory that exists"),
        ([str(run), "-o", str(tmp_path / "none" / "r.html")], "give the name of a file in a directory that exists"),
        ([str(tmp_path / "nothing")], "nothing is no run directory"),
    ):
        assert main(["report", *words]) == 2
        assert message in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- the record's file


def test_a_record_reads_back_as_written_and_in_equal_bytes(runs, tmp_path) -> None:
    path = tmp_path / "run" / "eval" / "traces-test.jsonl.gz"
    write_record(path, runs[0].record, runs[0].traces)
    first = path.read_bytes()
    record, traces = read_record(path)
    assert record == runs[0].record and tuple(traces) == runs[0].traces
    write_record(path, record, traces)
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": 99}, "line 2 is not what an evaluation writes: prompt 99 is not among the 4 recorded"),
        ({"reward": [0.0]}, "its lists of token values or step scores have different lengths"),
        ({"step_ends": [1, 0, 2]}, "step_ends must rise and end at the last token"),
        ({"text": ""}, "a token lies outside the text"),
    ],
)
def test_a_record_whose_parts_do_not_fit_is_refused(runs, tmp_path, change, message) -> None:
    path = tmp_path / "run" / "eval" / "traces-test.jsonl.gz"
    first = runs[0].traces[1]
    values = {f: getattr(first, f) for f in first.__dataclass_fields__} | change
    write_record(path, runs[0].record, [first.__class__(**values)])
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_record(path)
    assert f"run `airl-fast eval {tmp_path / 'run'}` again" in str(caught.value)

"""What the figures show is what was logged: curves, stacks, bars, intervals and chance lines, read back from them."""

import json
import math

import numpy as np
import pytest
from matplotlib.image import imread

from airl_fast.errors import UserError
from airl_fast.evaluate.plots import CURVES, curves_figure, plot_run, read_metrics, summary_figure
from airl_fast.evaluate.summary import Summary, write_summary
from airl_fast.measures.passk import Estimate

SUMMARY = Summary(
    pass_at_1={"start": Estimate(0.5, 0.4, 0.6), "airl": Estimate(0.9, 0.85, 0.95)},
    rerank_pass_at_1={"reward": Estimate(0.8, 0.7, 0.9), "random": Estimate(0.5, 0.4, 0.6)},
    rerank_n=16,
    localise_hit_at_1={"reward": Estimate(0.7, 0.6, 0.8), "chance": Estimate(0.2, 0.19, 0.21)},
    seconds=1.0,
    peak_rss_gib=1.0,
    seed=0,
)


def write_metrics(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")


def full_rows(steps=40):
    return [
        {"step": t, **{key: math.sin(t + i) for i, key in enumerate(CURVES)}, "seconds_a": 1.0, "seconds_b": 0.5}
        for t in range(steps)
    ]


def axis_named(figure, title):
    (axis,) = [a for a in figure.axes if a.get_title() == title]
    return axis


def test_metrics_are_read_by_step_and_tolerantly(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        {"run": "x"},
        {"step": 0, "entropy": 1.0, "phase": "policy", "ok": True},
        {"step": 1, "entropy": None},
        {"step": 2, "entropy": float("nan")},
        {"step": 3, "entropy": 4.0},
        {"step": 2, "entropy": 3.0},  # resumed: written again
    ]
    write_metrics(path, rows, tail='{"step": 4, "entr')
    assert read_metrics(path) == {"entropy": ([0.0, 2.0, 3.0], [1.0, 3.0, 4.0])}


def test_damaged_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "entropy": 1}\nnonsense\n{"step": 1}\n')
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read_metrics(path)
    path.write_text("")
    with pytest.raises(UserError, match="no finished step"):
        read_metrics(path)


def test_every_curve_is_drawn_as_logged(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", full_rows())
    figure = curves_figure(read_metrics(tmp_path / "metrics.jsonl"))
    for i, (_key, title) in enumerate(CURVES.items()):
        raw = axis_named(figure, title).get_lines()[0]
        np.testing.assert_allclose(raw.get_ydata(), [math.sin(t + i) for t in range(40)])
        np.testing.assert_array_equal(raw.get_xdata(), np.arange(40))


def test_the_average_is_centred(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", [{"step": t, "entropy": float(t)} for t in range(60)])
    axis = axis_named(curves_figure(read_metrics(tmp_path / "metrics.jsonl")), CURVES["entropy"])
    smooth = axis.get_lines()[1].get_ydata()
    np.testing.assert_allclose(smooth[3:-3], np.arange(3, 57))  # a straight line stays where it is
    assert smooth[0] == pytest.approx(1.5)  # mean of 0, 1, 2, 3


def test_missing_curves_leave_no_panel(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", [{"step": 0, "entropy": 1.0}, {"step": 1, "entropy": 2.0}])
    figure = curves_figure(read_metrics(tmp_path / "metrics.jsonl"))
    assert [a.get_title() for a in figure.axes if a.get_visible()] == [CURVES["entropy"]]
    with pytest.raises(UserError, match="none of the curves to draw"):
        curves_figure({"unknown": ([0.0], [1.0])})


def test_phases_are_stacked_to_the_seconds_of_a_step(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", full_rows())
    axis = axis_named(curves_figure(read_metrics(tmp_path / "metrics.jsonl")), "seconds per step, by phase")
    tops = [c.get_paths()[0].vertices[:, 1].max() for c in axis.collections]
    assert tops == pytest.approx([1.0, 1.5])
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["b", "a"]


def test_names_under_a_stage_are_found(tmp_path):
    row = {"step": 1, "policy/entropy": 0.3, "discriminator/accuracy": 0.7, "discriminator/perturbed_accuracy": 0.9}
    seconds = {"seconds/step": 3.0, "seconds/sample": 2.0, "seconds/policy": 0.5}
    write_metrics(tmp_path / "metrics.jsonl", [row | seconds, {**row, **seconds, "step": 2}])
    figure = curves_figure(read_metrics(tmp_path / "metrics.jsonl"))
    assert axis_named(figure, CURVES["entropy"]).get_lines()[0].get_ydata() == pytest.approx([0.3, 0.3])
    assert axis_named(figure, CURVES["d_accuracy"]).get_lines()[0].get_ydata() == pytest.approx([0.7, 0.7])
    axis = axis_named(figure, "seconds per step, by phase")
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["policy", "sample"]
    assert max(c.get_paths()[0].vertices[:, 1].max() for c in axis.collections) == pytest.approx(2.5)


def test_bars_intervals_and_chance_lines():
    figure = summary_figure(SUMMARY)
    policies, picks, steps = figure.axes
    assert [bar.get_height() for bar in policies.patches] == pytest.approx([50.0, 90.0])
    assert [t.get_text() for t in policies.texts] == ["50.0", "not run", "not run", "90.0"]
    assert picks.get_title() == "pass@1 of one pick of 16"
    for axis, chance in ((policies, 50.0), (picks, 50.0), (steps, 20.0)):
        (line,) = [line for line in axis.get_lines() if line.get_linestyle() == "--"]
        assert line.get_ydata() == pytest.approx([chance, chance])
    segments = [c.get_segments()[0][:, 1].tolist() for c in steps.collections]
    assert segments == [pytest.approx([60.0, 80.0]), pytest.approx([19.0, 21.0])]


def test_a_run_directory_gets_its_pictures(tmp_path):
    write_metrics(tmp_path / "metrics.jsonl", full_rows())
    write_summary(tmp_path / "summary.json", SUMMARY)
    assert [p.name for p in plot_run(tmp_path)] == ["plots.png", "summary.png"]
    for name in ("plots.png", "summary.png"):
        picture = imread(tmp_path / name)
        assert picture.shape[1] > 900
        blue = np.abs(picture[..., :3] - np.array([0x00, 0x72, 0xB2]) / 255).max(axis=-1) < 0.02
        assert blue.sum() > 500  # something was drawn, not an empty page


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither metrics.jsonl nor summary.json"):
        plot_run(tmp_path)

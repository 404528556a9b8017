"""`airl-fast localize`: predictions that no label touches, and tables that equal those of the parts they are of."""

import json
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from airl_fast.cli import main
from airl_fast.data.task import make_task
from airl_fast.judge.judge import open_judge
from airl_fast.judge.locate import calibrate, locate
from airl_fast.lab import load_material
from airl_fast.types import Example
from tests.airl_fast.run_cases import DATA, small_run

OPTIONS = {"min_ops": 1, "max_ops": 2, "train_size": 40, "dev_size": 16, "test_size": 16}
WORDS = [f"{key}={value}" for key, value in OPTIONS.items()]
ARITHMETIC = make_task("arithmetic", **OPTIONS)
BIGBENCH = DATA / "localisation" / "bigbench_mistake.jsonl"


def perturbed(path: Path, *words: object) -> Path:
    """Perturbed test demonstrations as a file."""
    assert main(["data", "perturb", "arithmetic", *WORDS, "--split", "test", "-o", str(path), *map(str, words)]) == 0
    return path


def written(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def localized(
    capsys: pytest.CaptureFixture, tmp_path: Path, file: Path, *words: object
) -> tuple[str, list[dict], dict | None]:
    """What was printed, the predictions, and the figures where there are any."""
    out, figures = tmp_path / "predictions.jsonl", tmp_path / "figures.json"
    figures.unlink(missing_ok=True)
    capsys.readouterr()
    argv = ["localize", str(small_run()), str(file), "-o", str(out), "--json", str(figures), "--force"]
    assert main([*argv, *map(str, words)]) == 0
    said = capsys.readouterr().out
    return said, read(out), json.loads(figures.read_text()) if figures.exists() else None


def refused(capsys: pytest.CaptureFixture, *words: object, run: Path | None = None) -> str:
    capsys.readouterr()
    assert main(["localize", str(run or small_run()), *map(str, words)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("airl-fast: ") and said[-1].endswith(".")
    return said[-1]


def test_perturbed_demonstrations_are_rows_with_their_labels(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = read(perturbed(tmp_path / "in.jsonl", "--copies", 2, "--originals", "-n", 10))
    said = capsys.readouterr().out
    assert "20 perturbed demonstrations and 10 as they are" in said and len(rows) == 30
    for example, (right, *broken) in zip(ARITHMETIC.load("test", 10), zip(*[iter(rows)] * 3, strict=True), strict=True):
        assert (right["completion"], right["first_wrong_step"], right["correct"]) == (example.expert, None, True)
        assert right["step_ends"] == ARITHMETIC.step_ends(example.expert)
        for row in broken:
            ends = [0, *row["step_ends"]]
            steps = [row["completion"][a:b] for a, b in pairwise(ends)]
            theirs = [example.expert[a:b] for a, b in zip([0, *right["step_ends"]], right["step_ends"], strict=False)]
            first = next(k for k, (a, b) in enumerate(zip(steps, theirs, strict=True)) if a != b)
            assert row["first_wrong_step"] == first and row["prompt"] == example.prompt
            assert row["correct"] is ARITHMETIC.verify(example, row["completion"])
    assert rows != read(perturbed(tmp_path / "other.jsonl", "--copies", 2, "--originals", "-n", 10, "--seed", 1))
    assert main(["data", "perturb", "arithmetic", "-o", str(tmp_path / "in.jsonl")]) == 2  # never over a file
    assert main(["data", "perturb", "arithmetic", "-o", str(tmp_path / "x.jsonl"), "--copies", "0"]) == 2
    assert main(["data", "perturb", "arithmetic", "--originals"]) == 2  # nothing would be written
    assert capsys.readouterr().err.endswith("--copies, --seed and --originals say what is written; add -o FILE.\n")


def test_the_figures_are_those_of_the_traces_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = perturbed(tmp_path / "in.jsonl", "--copies", 2, "--originals")
    said, predictions, figures = localized(capsys, tmp_path, file, "--part-tokens", 300)
    judge, rows = open_judge(small_run()), read(file)
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    examples = [Example(id=str(i), prompt=prompt, answer="") for i, prompt in enumerate(prompts)]
    traces = [
        judge.trace(examples[prompts.index(row["prompt"])], prompts.index(row["prompt"]), row["completion"])
        for row in rows
    ]
    scored = judge.score(traces, examples)
    thresholds = calibrate(judge, load_material(judge.config).train)
    truth = np.array([-1 if row["first_wrong_step"] is None else row["first_wrong_step"] for row in rows])
    expected = locate(scored, truth, judge.config.evaluate, thresholds, prompts=[t.group for t in traces])
    whole = figures["sections"][0]
    assert set(whole["localise"]) == set(expected) and {"reward", "logprob", "chance"} <= set(expected)
    for name, each in expected.items():
        for figure in ("hit_at_1", "hit_within_1", "mrr"):
            theirs = getattr(each, figure)
            assert whole["localise"][name][figure] == pytest.approx(
                {"value": theirs.value, "low": theirs.low, "high": theirs.high}
            ), name
    hits = [p["predicted"] == row["first_wrong_step"] for p, row in zip(predictions, rows, strict=True)]
    assert whole["localise"]["reward"]["hit_at_1"]["value"] == pytest.approx(np.mean(np.array(hits)[truth >= 0]))
    assert (whole["traces"], whole["wrong"], whole["without"]) == (48, 32, 16)
    assert figures["threshold"] == pytest.approx(thresholds["reward"])
    below = np.array([p["below_threshold"] for p in predictions])
    assert whole["alarms"]["without"]["value"] == pytest.approx(below[truth < 0].mean())
    assert {s["name"] for s in figures["sections"][1:]} == {row["group"] for row in rows}
    assert "first wrong step, 32 traces" in said and "has a wrong step: 32 of 48" in said
    assert max(map(len, said.splitlines())) <= 100


def test_predictions_say_everything_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = perturbed(tmp_path / "in.jsonl", "-n", 4)
    _, predictions, _ = localized(capsys, tmp_path, file, "--rule", "first_below", "--threshold", 0.0)
    for row, found in zip(read(file), predictions, strict=True):
        steps = found["steps"]
        assert [step["end"] for step in steps] == row["step_ends"] and [s["step"] for s in steps] == [
            *range(len(steps))
        ]
        assert sorted(step["rank"] for step in steps) == [*range(1, len(steps) + 1)]
        assert [s["rank"] for s in sorted(steps, key=lambda s: -s["suspicion"])] == [*range(1, len(steps) + 1)]
        below = [step["step"] for step in steps if step["reward"] < 0]
        lowest = min(steps, key=lambda step: step["reward"])["step"]
        assert found["predicted"] == (below[0] if below else lowest) and found["below_threshold"] is bool(below)
        assert found["text"] == steps[found["predicted"]]["text"] and (found["id"], found["threshold"]) == (
            row["id"],
            0,
        )
        assert (
            found["threshold_from"] == "--threshold" and found["labels"]["first_wrong_step"] == row["first_wrong_step"]
        )


def test_labels_change_the_figures_and_no_prediction(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = read(perturbed(tmp_path / "in.jsonl", "--originals"))
    first = written(tmp_path / "rows.jsonl", rows)
    _, one, figures = localized(capsys, tmp_path, first)
    flipped = [
        row | {"correct": not row["correct"], "first_wrong_step": 0 if row["first_wrong_step"] is None else None}
        for row in rows
    ]
    _, other, others = localized(capsys, tmp_path, written(first, flipped))
    assert [row.pop("labels") for row in one] != [row.pop("labels") for row in other] and one == other
    mine, theirs = (d["sections"][0]["detect"]["reward_lowest_step"]["pooled"]["value"] for d in (figures, others))
    assert mine == pytest.approx(1 - theirs)


def test_given_steps_are_kept_and_merge_where_a_token_spans_two(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    example = ARITHMETIC.load("test", 1)[0]
    text = example.expert
    inside = text.index("</think>") + 3  # within a token
    ends = [text.index("\n", 10) + 1, inside, inside + 2, len(text)]
    row = {"prompt": example.prompt, "completion": text, "step_ends": ends}
    rows = [row | {"first_wrong_step": k} for k in range(4)]
    _, predictions, figures = localized(capsys, tmp_path, written(tmp_path / "in.jsonl", rows), "--rule", "argmin")
    steps = predictions[0]["steps"]
    assert [step["step"] for step in steps] == [0, 1, 3]  # the second and third end in one token
    assert [step["end"] for step in steps] == [ends[0], text.index("</think>") + len("</think>"), len(text)]
    most = next(k for k, step in enumerate(steps) if step["rank"] == 1)
    hit = {0: 0.25, 1: 0.5, 2: 0.25}[most]  # labels 1 and 2 are one scored step
    assert figures["sections"][0]["localise"]["reward"]["hit_at_1"]["value"] == pytest.approx(hit)
    assert figures["sections"][0]["localise"]["chance"]["hit_at_1"]["value"] == pytest.approx(1 / 3)


def test_a_threshold_that_says_nothing_is_pointed_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = perturbed(tmp_path / "in.jsonl", "-n", 3, "--originals")
    high, _, figures = localized(capsys, tmp_path, file, "--rule", "first_below", "--threshold", 1000)
    assert figures["sections"][0]["alarms"]["without"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert "Nearly every trace does, so the rule names first steps" in " ".join(high.split())
    low, predictions, figures = localized(capsys, tmp_path, file, "--rule", "first_below", "--threshold", -1000)
    assert figures["sections"][0]["alarms"]["wrong"]["value"] == 0 and "Nearly every trace" not in low
    assert not any(found["below_threshold"] for found in predictions)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    example = ARITHMETIC.load("test", 1)[0]
    row = {"prompt": example.prompt, "completion": example.expert}
    file = written(tmp_path / "in.jsonl", [row])
    assert "have no label to compare with; write the predictions to a file with -o." in refused(capsys, file)
    said, predictions, figures = localized(capsys, tmp_path, file)
    assert said == "" and figures is None and len(predictions) == 1 and predictions[0]["labels"] == {}
    high = written(tmp_path / "high.jsonl", [row, row | {"first_wrong_step": 40}])
    assert f"{high}:2: 'first_wrong_step' is 40, but the task cuts the trace into" in refused(capsys, high)
    for ends in ([], [3, 3], [0, len(example.expert)], [5], "x", [5.0, len(example.expert)]):
        bad = written(tmp_path / "bad.jsonl", [row | {"step_ends": ends}])
        assert f"{bad}:1: 'step_ends' must be whole numbers that rise" in refused(capsys, bad)
    assert "rule largest_drop has none" in refused(capsys, file, "--rule", "largest_drop", "--threshold", 1)
    assert "--threshold nan: give a finite number" in refused(capsys, file, "--threshold", "nan")
    assert "standard output is for the tables" in refused(capsys, file, "-o", "-")
    assert "this is the input or -o" in refused(capsys, file, "--json", file)


def test_without_the_training_data_a_threshold_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    for name in ("start", "final/discriminator"):
        shutil.copytree(small_run() / name, run / name)
    config = (small_run() / "config.yaml").read_text()
    moved = config.replace("task: arithmetic\n  path: null", f"task: gsm8k\n  path: {tmp_path / 'gone'}")
    options = moved[moved.index("  options:") : moved.index("  num_experts:")]
    (run / "config.yaml").write_text(moved.replace(options, "  options: {}\n"))
    rows = [
        {"prompt": "start 1; gain 2?", "steps": ["1 + 2 = 3"], "final_answer": "3", "first_wrong_step": None},
        {"prompt": "start 1; gain 2?", "steps": ["1 + 2 = 4"], "final_answer": "4", "first_wrong_step": 0},
    ]
    file = written(tmp_path / "in.jsonl", rows)
    said = refused(capsys, file, "--allow-training-prompts", run=run)
    assert "takes its threshold from the run's training data" in said and "give --threshold X, or take --rule" in said
    assert "Or skip the comparison with --allow-training-prompts" in refused(capsys, file, "--rule", "argmin", run=run)
    for words, absent, note in (
        (("--rule", "argmin"), "reward, first below", "Without first below: rule first_below takes its threshold"),
        (("--threshold", "0.1"), "log-prob., first below", "threshold 0.1 from --threshold."),
    ):
        assert main(["localize", str(run), str(file), "--allow-training-prompts", *words]) == 0
        shown = capsys.readouterr().out
        assert "has a wrong step: 1 of 2" in shown and absent not in shown and note in shown


def test_bigbench_mistake_passes_through(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    if not BIGBENCH.is_file():
        pytest.skip(f"no {BIGBENCH}; set AIRL_DATA to the folder with the published data")
    with BIGBENCH.open() as lines:
        rows = sorted((json.loads(line) for line in lines), key=lambda row: len(json.dumps(row)))[:12]
    file = written(tmp_path / "mistake.jsonl", rows)
    said, predictions, figures = localized(capsys, tmp_path, file, "--too-long", "drop")
    assert 0 < figures["traces"] == len(predictions) < 12
    assert figures["too_long"] == 12 - figures["traces"]
    assert f"{figures['too_long']} traces were too long and are not in these figures" in " ".join(said.split())
    for found in predictions:
        (row,) = (row for row in rows if row["id"] == found["id"])
        assert found["labels"]["group"] == row["task"] and found["labels"]["first_wrong_step"] == row["first_error"]
        assert {step["step"] for step in found["steps"]} <= set(range(len(row["steps"])))
    assert f"{file}:" in refused(capsys, file)

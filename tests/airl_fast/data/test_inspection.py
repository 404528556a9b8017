"""What `airl-fast data …` prints: all mistakes of a file, counts of a task, steps, and perturbations as a diff."""

import json

import pytest

from airl_fast.data.inspection import prepare, preview, preview_perturbations, validate_file, validate_task
from airl_fast.data.task import make_task
from airl_fast.errors import UserError

GOOD = {"prompt": "1 + 1?", "expert": "1 + 1 = 2. Done.", "answer": "2"}
ARITHMETIC = make_task("arithmetic", train_size=20, dev_size=5, test_size=5, warmstart_size=50)


def test_all_mistakes_of_a_file_are_listed(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [GOOD, {"prompt": "x"}, GOOD, GOOD | {"expert": "<think>a</think><answer>9</answer>", "prompt": "y"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n{broken\n")
    report = validate_file(str(path))
    assert (report.rows, report.usable, report.duplicates, report.ok) == (5, 3, 1, False)
    assert [problem.partition(": ")[0] for problem in report.problems] == [f"{path}:2", f"{path}:5"]
    assert report.experts.failed == ("mine.jsonl:4",)
    assert str(report).splitlines() == [
        f"{path}: 5 rows, 3 usable, 2 with a problem",
        "1 rows repeat an earlier prompt",
        "2 of 3 demonstrations pass their own verifier; 1 fail (mine.jsonl:4)",
        *report.problems,
    ]


def test_a_clean_file_is_ok_and_an_empty_one_is_not(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    assert validate_file(str(tmp_path / "a.jsonl")).ok
    (tmp_path / "b.jsonl").write_text("\n")
    assert validate_file(str(tmp_path / "b.jsonl")).problems[0].endswith("holds no rows; write one JSON object a line.")
    with pytest.raises(UserError, match="no such file"):
        validate_file(str(tmp_path / "c.jsonl"))


def test_task_summary():
    train, dev, _, warmstart = validate_task(ARITHMETIC)
    assert (train.split, train.examples, dev.examples) == ("train", 20, 5)
    assert train.expert_chars == max(len(example.expert) for example in ARITHMETIC.load("train"))
    assert "20 of 20 demonstrations pass" in str(train)
    assert 0 < warmstart.experts.passed < 50


def test_task_summary_says_what_is_not_available(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "a", "answer": "1+1=<<1+1=2>>2\n#### 2"}))
    summaries = {summary.split: str(summary) for summary in validate_task(make_task("gsm8k", path=str(tmp_path)))}
    assert "holds no test.jsonl" in summaries["test"]
    assert "set data.options.warmstart_fraction" in summaries["warmstart"]


def test_preview_numbers_the_steps():
    (example,) = ARITHMETIC.load("train", 1)
    lines = example.expert.split("\n")
    shown = preview(ARITHMETIC, "train", 1).split("\n")
    assert shown[0] == f"== {example.id}   answer: {example.answer}" and shown[1] == example.prompt
    assert shown[2:4] == ["  0 | <think>", f"    | {lines[1]}"]
    assert shown[4] == f"  1 | {lines[2]}"


def test_preview_of_perturbations_is_a_diff():
    for seed in range(20):
        text = preview_perturbations(ARITHMETIC, n=1, seed=seed, kinds=("nudge_answer",))
        heading, *lines = text.split("\n")
        (example,) = ARITHMETIC.load("train", 1)
        assert "nudge_answer, first changed character" in heading
        assert [line[1:] for line in lines if line[0] in " -"] == example.expert.split("\n")
        assert [line[:9] for line in lines if line[0] == "+"] == ["+<answer>"]
    assert text == preview_perturbations(ARITHMETIC, n=1, seed=19, kinds=("nudge_answer",))
    assert ", carried on" in preview_perturbations(ARITHMETIC, n=20, kinds=("flip_operator",), propagate_rate=1.0)
    with pytest.raises(UserError, match="unknown perturbation"):
        preview_perturbations(ARITHMETIC, kinds=("flip",))


def test_prepared_files_load_as_the_same_examples(tmp_path):
    out = tmp_path / "train.jsonl"
    assert prepare(ARITHMETIC, "train", str(out), 7) == 7
    own = make_task("jsonl", path=str(out), dev_fraction=0.0, test_fraction=0.0)
    same = [(e.prompt, e.answer, e.expert) for e in ARITHMETIC.load("train", 7)]
    assert [(e.prompt, e.answer, e.expert) for e in own.load("train")] == same
    assert validate_file(str(out)).ok and not list(tmp_path.glob("*.part"))
    with pytest.raises(UserError, match="exists already"):
        prepare(ARITHMETIC, "train", str(out))
    with pytest.raises(UserError, match="evaluation only"):
        prepare(ARITHMETIC, "test", str(tmp_path / "test.jsonl"))
    with pytest.raises(UserError, match="cannot be written"):
        prepare(ARITHMETIC, "train", str(tmp_path / "none" / "x.jsonl"))

"""A user's own file: what is accepted, and one sentence with file and line for everything that is not."""

import json
import random

import pytest

from airl_fast.data.files import read_rows
from airl_fast.data.tags import format_trace
from airl_fast.data.task import check_experts, make_task
from airl_fast.errors import UserError

GOOD = {"prompt": "1 + 1?", "expert": "It is 1 + 1 = 2.", "answer": "2"}


def save(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return make_task("jsonl", path=str(path), dev_fraction=0.0, test_fraction=0.0)


def only(path, row):
    (example,) = save(path, row).load("train")
    return example


def test_plain_thoughts_are_closed_with_the_answer(tmp_path):
    example = only(tmp_path / "mine.jsonl", GOOD)
    assert example.expert == format_trace("It is 1 + 1 = 2.", "2")
    assert (example.id, example.prompt, example.answer) == ("mine.jsonl:1", "1 + 1?", "2")


def test_a_whole_trace_keeps_its_own_answer_in_canonical_form(tmp_path):
    row = GOOD | {"expert": " <think> a\nb </think>\n\n<answer> 3 </answer>\n"}
    assert only(tmp_path / "mine.jsonl", row).expert == format_trace("a\nb", "3")


@pytest.mark.parametrize(("answer", "text"), [(2, "2"), (2.5, "2.5"), (" x ", "x"), (10**400, "1" + "0" * 400)])
def test_answers_may_be_numbers(answer, text, tmp_path):
    assert only(tmp_path / "mine.jsonl", GOOD | {"answer": answer}).answer == text


def test_null_means_no_demonstration(tmp_path):
    assert only(tmp_path / "mine.jsonl", GOOD | {"expert": None}).expert is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("nonsense", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "not JSON"),
        ('"text"', "a str, not an object"),
        ({"prompt": "x", "expert": "y"}, "lacks the field 'answer'"),
        ({"prompt": "x", "answer": "y"}, "lacks the field 'expert'"),
        ({"expert": "x", "answer": "y"}, "lacks the field 'prompt'"),
        (GOOD | {"prompt": ""}, "'prompt' is empty"),
        (GOOD | {"expert": " \n"}, "'expert' is empty"),
        (GOOD | {"answer": ""}, "'answer' is empty"),
        (GOOD | {"prompt": None}, "'prompt' is null, not a string"),
        (GOOD | {"expert": ["a"]}, "'expert' is a list, not a string"),
        (GOOD | {"answer": True}, "'answer' is a bool, not a string"),
        (GOOD | {"answer": float("nan")}, "'answer' is a float, not a string"),
        (GOOD | {"answer": None}, "'answer' is null"),
        (GOOD | {"expert": "<think>a</think>"}, "not of the form"),
        (GOOD | {"expert": "<answer>2</answer><think>a</think>"}, "not of the form"),
        (GOOD | {"expert": "<think> </think><answer>2</answer>"}, "not of the form"),
        (GOOD | {"expert": "<think>a</think><answer></answer>"}, "not of the form"),
        (GOOD | {"expert": "<think>a</think><answer>1</answer><answer>2</answer>"}, "not of the form"),
        (GOOD | {"expert": "so <think>a</think><answer>2</answer>"}, "not of the form"),
    ],
)
def test_mistakes_name_file_and_line(row, message, tmp_path):
    with pytest.raises(UserError) as caught:
        save(tmp_path / "mine.jsonl", GOOD, "", row).load("train")
    assert f"{tmp_path}/mine.jsonl:3: " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unicode_line_separators_and_byte_order_marks_are_no_line_breaks(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\ufeff" + json.dumps(GOOD | {"prompt": "a\u2028b\x85c"}, ensure_ascii=False) + "\r\n", "utf-8")
    assert [row["prompt"] for _, row in read_rows(path)] == ["a\u2028b\x85c"]


def rows(*names):
    return [GOOD | {"prompt": f"prompt {name}"} for name in names]


def test_one_file_is_carved_into_disjoint_splits(tmp_path):
    save(tmp_path / "mine.jsonl", *rows(*range(400)))
    task = make_task("jsonl", path=str(tmp_path / "mine.jsonl"), dev_fraction=0.2, test_fraction=0.1)
    parts = {split: [example.prompt for example in task.load(split)] for split in ("train", "dev", "test")}
    assert sorted(prompt for part in parts.values() for prompt in part) == sorted(f"prompt {i}" for i in range(400))
    assert 50 < len(parts["dev"]) < 110 and 20 < len(parts["test"]) < 60
    assert task.load("dev", 5) == task.load("dev")[:5]
    with pytest.raises(UserError, match=r"no warmstart\.jsonl .* set data\.options\.warmstart_fraction"):
        task.load("warmstart")


def test_a_folder_with_its_own_files(tmp_path):
    save(tmp_path / "train.jsonl", *rows(*range(50)))
    save(tmp_path / "test.jsonl", *rows("x", "y"))
    task = make_task("jsonl", path=str(tmp_path), dev_fraction=0.0)
    assert [example.prompt for example in task.load("test")] == ["prompt x", "prompt y"]
    assert len(task.load("train")) == 50  # nothing is carved for the test set that has its own file
    with pytest.raises(UserError, match=r"has no dev\.jsonl"):
        task.load("dev")


def test_a_training_prompt_in_the_test_file_is_refused(tmp_path):
    save(tmp_path / "train.jsonl", *rows("a", "b"))
    save(tmp_path / "test.jsonl", *rows("c", " b"))
    with pytest.raises(UserError, match=r"train\.jsonl: the prompt of train\.jsonl:2 is also that of test\.jsonl:2"):
        make_task("jsonl", path=str(tmp_path)).load("train")


def test_verification_and_failing_demonstrations(tmp_path):
    wrong = GOOD | {"prompt": "p", "expert": "<think>a</think><answer>3</answer>"}
    task = save(tmp_path / "mine.jsonl", GOOD, wrong)
    examples = task.load("train")
    assert check_experts(task, examples).failed == ("mine.jsonl:2",)
    assert task.verify(examples[0], format_trace("x", "$2.0"))
    assert task.canonical_answer(examples[0], format_trace("x", "$2.0")) == "2"


def test_perturbations_of_user_text(tmp_path):
    task = save(tmp_path / "mine.jsonl", GOOD)
    (example,) = task.load("train")
    texts = {task.perturb(example, example.expert, random.Random(s), propagate_rate=1.0).text for s in range(60)}
    assert format_trace("It is 1 - 1 = 0.", "0") in texts
    assert all(text != example.expert for text in texts)


def test_bad_fractions():
    with pytest.raises(UserError, match="sum below 1"):
        make_task("jsonl", path="x", dev_fraction=0.6, test_fraction=0.5)
    with pytest.raises(UserError, match="must be 0 or more"):
        make_task("jsonl", path="x", dev_fraction=0.6, test_fraction=-0.5)

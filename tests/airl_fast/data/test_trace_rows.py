"""Traces of three layouts: what a scorer sees, what it does not, and which line is at fault."""

import gzip
import json
from pathlib import Path

import pytest

from airl_fast.data.tags import extract_answer
from airl_fast.data.trace_rows import NO_ERROR, TraceLabels, join_steps, read_traces
from airl_fast.errors import UserError
from tests.airl_fast.run_cases import DATA


def written(path: Path, *rows: dict | str) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_our_own_layout(tmp_path: Path) -> None:
    file = written(
        tmp_path / "in.jsonl",
        {"prompt": "p", "completion": "<think>\na\n</think>\n<answer>1</answer>", "answer": 1, "correct": True},
        {"id": "x", "prompt": "p", "steps": ["one", " two "], "final_answer": "3", "first_wrong_step": None},
        {"prompt": "q", "steps": ["one"], "first_wrong_step": 0},
    )
    (first, seen), (second, steps), (third, last) = read_traces(file)
    assert (first.id, first.place, first.step_ends) == ("in.jsonl:1", f"{file}:1", None)
    assert seen == TraceLabels(gold="1", correct=True)
    assert second.id == "x" and second.text == "<think>\none\ntwo\n</think>\n<answer>3</answer>"
    assert [second.text[a:b] for a, b in zip((0, *second.step_ends), second.step_ends, strict=False)] == [
        "<think>\none\n", "two\n</think>\n<answer>3</answer>",
    ]  # fmt: skip
    assert steps.first_wrong_step == NO_ERROR and last.first_wrong_step == 0
    assert third.text == "<think>\none\n</think>" and third.step_ends == (len(third.text),)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("[1]", "not an object"),
        ("{", "not JSON"),
        ({"text": "a"}, "no trace in a known layout"),
        ({"prompt": "a"}, "either 'completion' or 'steps'"),
        ({"prompt": "a", "completion": "b", "steps": ["c"]}, "either 'completion' or 'steps'"),
        ({"prompt": "a", "completion": " "}, "'completion' is empty"),
        ({"prompt": "a", "completion": 3}, "'completion' is a int"),
        ({"prompt": "a", "steps": ["", " "]}, "'steps' must be a list of strings"),
        ({"prompt": "a", "steps": "b"}, "'steps' must be a list of strings"),
        ({"prompt": "a", "steps": ["b"], "first_wrong_step": 1}, "below 1, the number of steps, not 1"),
        ({"prompt": "a", "completion": "b", "first_wrong_step": True}, "whole number from 0, not True"),
        ({"prompt": "a", "completion": "b", "correct": "yes"}, "'correct' must be true, false or null"),
        ({"prompt": "a", "completion": "b", "answer": [1]}, "'answer' must be a string or a number"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, row: dict | str, sentence: str) -> None:
    file = written(tmp_path / "in.jsonl", {"prompt": "p", "completion": "c"}, "", row)
    with pytest.raises(UserError, match=f"{file}:3: .*".replace("[", r"\[") + sentence.replace("(", r"\(")):
        list(read_traces(file))


def test_rows_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    file = written(tmp_path / "in.jsonl", {"prompt": "p", "completion": "c"}, "{")
    rows = read_traces(file)
    assert next(rows)[0].prompt == "p"  # the broken line is not looked at yet
    with pytest.raises(UserError, match=":2: not JSON"):
        next(rows)


def test_gzip_and_what_is_not(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "in.jsonl.gz", "wt") as file:
        file.write('{"prompt": "p", "completion": "c"}\n')
    assert len(list(read_traces(tmp_path / "in.jsonl.gz"))) == 1
    (tmp_path / "bad.jsonl.gz").write_text("plain")
    with pytest.raises(UserError, match="not a complete gzip file"):
        list(read_traces(tmp_path / "bad.jsonl.gz"))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_traces(tmp_path / "absent.jsonl"))


def test_joined_steps_end_where_they_should() -> None:
    steps = ["a b", "c\nd", "e"]
    text, ends = join_steps(steps, None)
    pieces = [text[a:b] for a, b in zip((0, *ends), ends, strict=False)]
    assert [piece.replace("<think>", "").replace("</think>", "").strip() for piece in pieces] == steps


@pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"{DATA} holds no published data")
def test_published_model_solutions() -> None:
    rows = list(read_traces(DATA / "gsm8k" / "model_solutions.jsonl.gz"))
    assert len(rows) == 2638 and {labels.group for _, labels in rows} == {"6b_finetuning", "6b_verification"}
    first, labels = rows[0]
    assert first.text.startswith("<think>\nJanet eats 3 ducks eggs") and "<<" not in first.text
    assert extract_answer(first.text) == "26" and (labels.gold, labels.correct) == ("18", False)
    assert "A: 26" not in first.text
    assert sum(labels.correct for _, labels in rows) == 801


@pytest.mark.skipif(not (DATA / "localisation").is_dir(), reason=f"{DATA} holds no published data")
def test_bigbench_mistake() -> None:
    rows = list(read_traces(DATA / "localisation" / "bigbench_mistake.jsonl"))
    assert len(rows) == 1458
    raw = [json.loads(line) for line in (DATA / "localisation" / "bigbench_mistake.jsonl").read_text().splitlines()]
    for (row, labels), source in zip(rows, raw, strict=True):
        assert len(row.step_ends) == len(source["steps"]) and row.step_ends[-1] == len(row.text)
        assert labels.first_wrong_step == (NO_ERROR if source["first_error"] is None else source["first_error"])
        assert source["gold"] is None or labels.gold == source["gold"].strip() or not source["gold"].strip()

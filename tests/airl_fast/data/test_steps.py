"""Step ends: every text is cut into non-empty pieces that join to it, at lines and sentences only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airl_fast.data.steps import split_steps, step_ends
from airl_fast.data.tags import format_trace


def test_lines_of_a_trace_are_steps_and_the_answer_is_the_last():
    text = format_trace("7 + 1 = 8\n8 - 3 = 5", "5")
    assert split_steps(text) == ["<think>\n7 + 1 = 8\n", "8 - 3 = 5\n", "</think>\n<answer>5</answer>"]


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("Pi is 3.14 or so. Then 2.5 is less.", ["Pi is 3.14 or so.", " Then 2.5 is less."]),
        ("Use a drug, e.g. Aspirin. It works.", ["Use a drug, e.g. Aspirin.", " It works."]),
        ("Dr. Smith et al. Say so! Do they?  Yes.", ["Dr. Smith et al. Say so!", " Do they?", "  Yes."]),
        ("See No. 5 first. The answer is no. Stop.", ["See No. 5 first.", " The answer is no.", " Stop."]),
        ("1. Add them. 2. Halve it.", ["1. Add them.", " 2. Halve it."]),
        ("It costs 5. Next day 6.", ["It costs 5.", " Next day 6."]),
        ("J. Doe left. so what", ["J. Doe left. so what"]),
        ('He said "stop." Then left.', ['He said "stop."', " Then left."]),
        ("Wait... What now", ["Wait...", " What now"]),
        ("A.\n\n  \nB", ["A.\n\n  \n", "B"]),
        ("one\n---\n", ["one\n---\n"]),
        ("...", ["..."]),
        ("", []),
    ],
)
def test_boundaries(text, steps):
    assert split_steps(text) == steps


@given(st.text(alphabet='aB1.?! \n"(<think></answer>é', max_size=60))
def test_pieces_join_to_the_text_and_none_is_empty(text):
    ends = step_ends(text)
    assert ends == sorted(set(ends))
    assert "".join(split_steps(text)) == text
    assert (ends[-1] == len(text)) if text else ends == []


@given(st.lists(st.sampled_from(["1 + 2 = 3", "He has 3.5 left", "é is a letter"]), min_size=1, max_size=8))
def test_plain_lines_give_one_step_each(lines):
    assert len(step_ends(format_trace("\n".join(lines), "4"))) == len(lines) + 1


def test_long_runs_of_blanks_and_breaks_stay_fast():
    text = " " * 20_000 + "\n" * 20_000 + "a. " * 5_000
    assert step_ends(text)[-1] == len(text)

"""Countdown puzzles: solvable as generated, and no answer gets past the verifier that breaks a rule."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airl_fast.data.countdown import Countdown, parse_puzzle
from airl_fast.data.perturb import KINDS
from airl_fast.data.tags import extract_answer, format_trace
from airl_fast.data.task import SPLITS, Task, make_task
from airl_fast.data.verify import safe_arithmetic
from airl_fast.errors import UserError
from airl_fast.types import Example

TASK = Countdown(train_size=150, dev_size=50, test_size=50, warmstart_size=150)
PUZZLE = Example(id="p", prompt="Make 24 from the numbers 3, 5, 3, 8. Use each number at most once", answer="24")


def verify(answer):
    return TASK.verify(PUZZLE, format_trace("x", answer))


@pytest.mark.parametrize("answer", ["3 * 8", "8*3", "(3 + 5) × 3"])
def test_right_answers(answer):
    assert verify(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "24",  # not a given number
        "8 + 8 + 8",  # 8 is given once
        "3 * 3 * 3 - 3",  # 3 is given twice
        "3 + 5",  # misses the target
        "3 * 8 = 24",
        "2 ** 3 * 3",
        "8 * 3 and more",
        "__import__('os').getpid()",
        "(1).__class__",
        "",
    ],
)
def test_wrong_answers(answer):
    assert not verify(answer)


def test_no_answer_tag_is_wrong():
    assert not TASK.verify(PUZZLE, "3 * 8")


@given(st.text(max_size=60))
def test_no_text_raises(answer):
    assert verify(answer) in (True, False)


@given(
    st.integers(2, 4).flatmap(
        lambda n: st.tuples(*[st.tuples(st.sampled_from("+-*/"), st.sampled_from([3, 5, 8]))] * n)
    )
)
def test_verdict_equals_a_count_and_a_value(terms):
    text = "".join(f" {sign} {number}" for sign, number in terms)[3:]
    expression = safe_arithmetic(text)
    legal = all(count <= {3: 2, 5: 1, 8: 1}[n] for n, count in Counter(n for _, n in terms).items())
    assert verify(text) == (legal and expression.value == 24)


@pytest.mark.parametrize("split", SPLITS)
def test_generated_solutions_hold(split):
    for example in TASK.load(split):
        target, numbers = parse_puzzle(example.prompt)
        assert str(target) == example.answer and 1 <= target <= 100 and target not in numbers
        assert 3 <= len(numbers) <= 4 and all(1 <= n <= 20 for n in numbers)
        expression = safe_arithmetic(extract_answer(example.expert))
        assert sorted(expression.numbers) == sorted(numbers) and expression.value == target
        assert TASK.verify(example, example.expert)
        lines = example.expert.split("\n")[1:-2]
        assert len(lines) == len(numbers) - 1
        for line in lines:
            left, right = line.split(" = ")
            assert safe_arithmetic(left).value == int(right) > 0


def test_a_puzzle_and_its_reorderings_have_one_split_whatever_the_seed():
    seen = {}
    for seed in range(3):
        task = Countdown(seed=seed, train_size=300, dev_size=100, test_size=100, warmstart_size=300, max_number=9)
        for split in SPLITS:
            for example in task.load(split):
                target, numbers = parse_puzzle(example.prompt)
                assert seen.setdefault((target, *sorted(numbers)), split) == split
    assert len(seen) > 1200


def test_deterministic_and_prefix():
    assert isinstance(TASK, Task)
    assert TASK.load("train", 20) == TASK.load("train")[:20]
    assert TASK.load("train", 20) != Countdown(seed=1).load("train", 20)


def test_perturbed_solutions_are_wrong_or_differ_in_the_thoughts():
    for seed in range(5):
        rng = random.Random(seed)
        for example in TASK.load("dev"):
            change = TASK.perturb(example, example.expert, rng, KINDS)
            if extract_answer(change.text) != extract_answer(example.expert):
                assert not TASK.verify(example, change.text)


def test_canonical_answer_is_the_value_of_a_legal_expression():
    assert TASK.canonical_answer(PUZZLE, format_trace("x", "3 * 8")) == "24"
    assert TASK.canonical_answer(PUZZLE, format_trace("x", "(3+5)*3")) == "24"
    assert TASK.canonical_answer(PUZZLE, format_trace("x", "5 / 3")) == "5/3"
    assert TASK.canonical_answer(PUZZLE, format_trace("x", "8 + 8")) == "8 + 8"
    assert TASK.canonical_answer(PUZZLE, "nothing") is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_numbers": 1}, "min_numbers"),
        ({"max_numbers": 9}, "max_numbers"),
        ({"max_target": 1}, "max_target must lie between"),
        ({"dev_size": -2}, "dev_size must be 0 or more"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        make_task("countdown", **options)


def test_too_few_puzzles():
    with pytest.raises(UserError, match="distinct train puzzles"):
        Countdown(max_number=3, min_numbers=2, max_numbers=2, train_size=500).load("train")

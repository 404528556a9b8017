"""The generated task: deterministic, disjoint, and with the misconception it claims."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airl_fast.data.arithmetic import (
    CHARSET,
    Arithmetic,
    make_example,
    parse_prompt,
    propagate_lines,
    student_trace,
)
from airl_fast.data.perturb import KINDS, perturb
from airl_fast.data.steps import split_steps
from airl_fast.data.tags import TAGS, extract_answer, format_trace
from airl_fast.data.task import SPLITS, LocatesErrors, Task, make_task
from airl_fast.errors import UserError

EXAMPLE = make_example("start 7; gain 1; lose 4; gain 5; lose 5?")
SMALL = Arithmetic(train_size=60, dev_size=60, test_size=60, warmstart_size=300)
LINE = re.compile(r"(-?\d+) ([+-]) (\d+) = (-?\d+)")


def walk(text):
    return [
        (int(a), b if s == "+" else -b, int(c))
        for a, s, b, c in ((a, s, int(b), c) for a, s, b, c in LINE.findall(text))
    ]


def test_an_example_in_full():
    assert EXAMPLE.expert == "<think>\n7 + 1 = 8\n8 - 4 = 4\n4 + 5 = 9\n9 - 5 = 4\n</think>\n<answer>4</answer>"
    assert EXAMPLE.answer == "4"
    assert parse_prompt(EXAMPLE.prompt) == (7, [1, -4, 5, -5])


def test_it_is_a_task_that_locates_errors():
    assert isinstance(SMALL, Task) and isinstance(SMALL, LocatesErrors)


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_keep_the_promised_ranges_and_characters(split):
    for example in SMALL.load(split):
        value, operations = parse_prompt(example.prompt)
        assert 4 <= len(operations) <= 5
        for amount in operations:
            value += amount
            assert 1 <= abs(amount) <= 5 and 0 <= value <= 9
        assert example.answer == str(value)
        text = example.prompt + example.expert
        for tag in TAGS:
            text = text.replace(tag, "")
        assert set(text) <= set(CHARSET)
    assert len(CHARSET) + len(TAGS) <= 31


def test_demonstrations_are_right_line_by_line():
    for example in SMALL.load("train"):
        value, operations = parse_prompt(example.prompt)
        for (left, amount, result), asked in zip(walk(example.expert), operations, strict=True):
            assert (left, amount, result) == (value, asked, value + asked)
            value = result
        assert SMALL.verify(example, example.expert)
        assert SMALL.first_wrong_step(example, example.expert) is None


def test_a_prompt_has_one_split_whatever_the_seed():
    seen = {}
    for seed in range(3):
        task = Arithmetic(seed=seed, train_size=800, dev_size=400, test_size=400, warmstart_size=1500)
        for split in SPLITS:
            for example in task.load(split):
                assert seen.setdefault(example.prompt, split) == split
    assert len(seen) > 5000


def test_loading_is_deterministic_and_a_limit_is_a_prefix():
    for split in SPLITS:
        assert SMALL.load(split) == Arithmetic(train_size=60, dev_size=60, test_size=60, warmstart_size=300).load(split)
        assert SMALL.load(split, 7) == SMALL.load(split)[:7]
        assert SMALL.load(split)[:5] != Arithmetic(seed=1).load(split, 5)
    assert len({example.prompt for example in SMALL.load("train")}) == 60
    assert len({example.id for example in SMALL.load("warmstart")}) == 300


def test_student_subtracts_three_and_adds_four():
    trace = student_trace(EXAMPLE, random.Random(0), student_rate=1.0, slip_rate=0.0)
    assert trace == "<think>\n7 + 1 = 8\n8 - 4 = 5\n5 + 5 = 9\n9 - 5 = 6\n</think>\n<answer>6</answer>"
    assert student_trace(EXAMPLE, random.Random(0), "clean") == EXAMPLE.expert


def test_slips_are_as_frequent_as_said_and_carry_on():
    steps = slips = 0
    for example in Arithmetic().warm_start_corpus(3000, "noisy"):
        value = parse_prompt(example.prompt)[0]
        for left, amount, result in walk(example.expert):
            assert left == value
            steps += 1
            slips += result != left + amount
            value = result
        assert extract_answer(example.expert) == str(value)
    assert abs(slips / steps - 0.15) < 0.015


def test_misconception_corpus_has_the_recipes_share_of_right_answers():
    corpus = Arithmetic().warm_start_corpus(4000)
    right = sum(SMALL.verify(example, example.expert) for example in corpus) / len(corpus)
    assert 0.52 < right < 0.59
    believed = {-4: -3, -5: -3, 5: 4}
    touched = student = 0
    for example in corpus:
        deviations = [(amount, result - left) for left, amount, result in walk(example.expert) if amount in believed]
        touched += bool(deviations)
        student += bool(deviations) and all(believed[amount] == change for amount, change in deviations)
    assert abs(student / touched - 0.65) < 0.04


def test_expert_error_rate_applies_to_training_demonstrations_only():
    task = Arithmetic(train_size=400, expert_error_rate=0.3)
    wrong = [example for example in task.load("train") if not task.verify(example, example.expert)]
    assert 80 < len(wrong) < 160
    assert all(task.first_wrong_step(example, example.expert) is not None for example in wrong)
    assert all(task.verify(example, example.expert) for example in task.load("dev"))


@pytest.mark.parametrize(
    ("lines", "answer", "wrong"),
    [
        (["7 + 1 = 8", "8 - 4 = 4", "4 + 5 = 9", "9 - 5 = 4"], "4", None),
        (["7 + 1 = 8", "8 - 4 = 5", "5 + 5 = 10", "10 - 5 = 5"], "5", 1),  # result
        (["7 + 1 = 8", "8 - 3 = 5", "5 + 5 = 10", "10 - 5 = 5"], "5", 1),  # operand
        (["7 - 1 = 6", "8 - 4 = 4", "4 + 5 = 9", "9 - 5 = 4"], "4", 0),  # operator, though later lines are right
        (["7 + 1 = 8", "8 - 4 = 4", "5 + 5 = 10", "9 - 5 = 4"], "4", 2),  # left operand
        (["7 + 1 = 8", "8 - 4 = 4", "4 + 5 = 9", "9 - 5 = 4"], "9", 4),  # the answer
        (["7 + 1 = 8", "8 - 4 = 4", "4 + 5 = 9"], "9", 3),  # a missing line shows at the answer
        (["7 + 1 = 8", "8 - 4 = 4", "4 + 5 = 9", "9 - 5 = 4", "4 + 1 = 5"], "5", 4),  # a surplus line
        (["7 + 1 = 8", "8 -- 4", "4 + 5 = 9", "9 - 5 = 4"], "4", 1),  # no line at all
    ],
)
def test_first_wrong_step(lines, answer, wrong):
    text = format_trace("\n".join(lines), answer)
    assert SMALL.first_wrong_step(EXAMPLE, text) == wrong
    assert wrong is None or wrong < len(split_steps(text))


def test_first_wrong_step_of_broken_texts_is_a_step():
    assert SMALL.first_wrong_step(EXAMPLE, "<think>\n7 + 1 = 8\n8 -") == 1
    assert SMALL.first_wrong_step(EXAMPLE, "<think>\n7 + 1 = 8\n") == 0
    assert SMALL.first_wrong_step(EXAMPLE, "4") == 0
    assert SMALL.first_wrong_step(EXAMPLE, "") == 0


@given(st.text(alphabet=CHARSET + "<>/hkw", max_size=120))
def test_any_completion_is_judged(text):
    wrong = SMALL.first_wrong_step(EXAMPLE, text)
    assert wrong is None or 0 <= wrong < max(1, len(split_steps(text)))
    assert (wrong is None) <= SMALL.verify(EXAMPLE, text)


@given(st.integers(0, 10**6), st.sampled_from(KINDS[:2]), st.sampled_from(["clean", "misconception", "noisy"]))
def test_propagation_leaves_one_error_more_and_no_seam(seed, kind, mode):
    rng = random.Random(seed)
    example = SMALL.load("train", 20)[seed % 20]
    text = student_trace(example, rng, mode)
    change = perturb(text, rng, (kind,), propagate=propagate_lines)
    before, after = walk(text), walk(change.text)
    changed = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    at = changed[0]
    touched = text[: change.first_changed].count("\n") - 1
    assert at == touched
    # From the line after the error on, every line starts at the result before it and keeps its own operation and slip.
    for index in range(at + 1, len(after)):
        assert after[index][0] == after[index - 1][2]
        assert after[index][1] == before[index][1]
        assert after[index][2] - sum(after[index][:2]) == before[index][2] - sum(before[index][:2])
    assert extract_answer(change.text) == str(after[-1][2])
    assert mode != "clean" or SMALL.first_wrong_step(example, change.text) == at


def test_task_perturbations_are_wrong_where_they_say():
    rng = random.Random(0)
    for example in SMALL.load("train"):
        change = SMALL.perturb(example, example.expert, rng)
        step = sum(end <= change.first_changed for end in SMALL.step_ends(change.text))
        assert SMALL.first_wrong_step(example, change.text) == step


def test_a_perturbation_never_makes_a_wrong_answer_right():
    wrong = EXAMPLE.expert.replace("<answer>4<", "<answer>5<")
    for seed in range(100):
        change = SMALL.perturb(EXAMPLE, wrong, random.Random(seed), ("nudge_answer", "swap_answer"))
        assert not SMALL.verify(EXAMPLE, change.text)
    slipped = EXAMPLE.expert.replace("8 - 4 = 4", "8 + 4 = 4")
    for seed in range(100):
        change = SMALL.perturb(EXAMPLE, slipped, random.Random(seed))
        assert SMALL.first_wrong_step(EXAMPLE, change.text) is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_ops": 6}, "min_ops <= max_ops"),
        ({"train_size": -1}, "train_size must be 0 or more"),
        ({"student_rate": 1.5}, "student_rate must lie between 0 and 1"),
        ({"slip_rate": -0.1}, "slip_rate"),
        ({"warmstart_mode": "naive"}, "warmstart_mode must be one of"),
        ({"train_size": "many"}, "'train_size' must be a int"),
        ({"trainsize": 5}, "did you mean 'train_size'"),
        ({"path": "somewhere"}, "remove data.path"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        make_task("arithmetic", **options)


def test_too_few_distinct_prompts():
    with pytest.raises(UserError, match="distinct train prompts"):
        Arithmetic(min_ops=1, max_ops=1, train_size=500).load("train")


def test_unknown_task_and_split():
    with pytest.raises(UserError, match="did you mean 'arithmetic'"):
        make_task("arithmetics")
    with pytest.raises(UserError, match="choose one of"):
        make_task("chess")
    with pytest.raises(UserError, match="did you mean 'train'"):
        SMALL.load("trian")

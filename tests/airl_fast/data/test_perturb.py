"""Perturbations change one thing outside the tags, remember where, and carry on what follows from it."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airl_fast.data.perturb import (
    KINDS,
    Perturbation,
    corrupt_number,
    flip_operator,
    nudge_answer,
    perturb,
    swap_answer,
)
from airl_fast.data.propagate import propagate_numbers
from airl_fast.data.tags import TAGS, extract_answer, format_trace, thought_span
from airl_fast.data.verify import parse_number
from airl_fast.errors import UserError

TRACE = format_trace("He has 48/2 = 24 clips.\nThen 48+24 = 72 in all, 10% of 720.", "72")

numbers = st.integers(0, 10_000)
lines = st.builds(
    lambda a, sign, b, unit: f"So {a} {sign} {b} = {a + b:,} {unit}",
    numbers,
    st.sampled_from("+-*/×÷−"),
    numbers,
    st.sampled_from(["clips.", "%", "", "3rd $5.25", "é"]),
)
traces = st.builds(
    lambda rows, answer: format_trace("\n".join(rows), str(answer)), st.lists(lines, min_size=1), numbers
)


def results(function, text, n=200, **options):
    return {function(text, random.Random(seed), **options).text for seed in range(n)}


def test_flip_operator_touches_only_equations():
    assert results(flip_operator, TRACE) == {TRACE.replace("48/2", "48*2"), TRACE.replace("48+24", "48-24")}
    assert flip_operator(format_trace("24/7 a week - or 5-10 days", "3"), random.Random(0)) is None
    for text, flipped in [
        ("2 × 3 = 6", "2 ÷ 3 = 6"),
        ("$0.2 x 50 = 10", "$0.2 / 50 = 10"),
        ("(1+2) - 3 = 0", "(1+2) + 3 = 0"),
    ]:
        assert format_trace(flipped, "6") in results(flip_operator, format_trace(text, "6"))


def test_corrupt_number_moves_one_literal_a_little():
    seen = results(corrupt_number, format_trace("1. It is 9.75 of 1,000, not 0", "5"))
    thoughts = {text[slice(*thought_span(text))].strip() for text in seen}
    expected = {f"1. It is {9.75 + k / 100:.2f} of 1,000, not 0" for k in (-3, -2, -1, 1, 2, 3)}
    expected |= {f"1. It is 9.75 of {1000 + k:,}, not 0" for k in (-3, -2, -1, 1, 2, 3)}
    expected |= {f"1. It is 9.75 of 1,000, not {k}" for k in (1, 2, 3)}
    assert thoughts == expected
    assert results(corrupt_number, "-1") == {"-2", "-3", "-4"}  # never "-0"


def test_swap_answer_prefers_results():
    assert results(swap_answer, TRACE) == {TRACE.replace(">72<", ">24<")}
    assert results(swap_answer, format_trace("from 3 to 8", "8")) == {format_trace("from 3 to 8", "3")}
    assert results(swap_answer, format_trace("1 - 2 = -1", "-2")) == {format_trace("1 - 2 = -1", "-1")}
    for text in (
        format_trace("5 = 5.0", "5"),
        format_trace("1 + 1 = 2", "two"),
        "1 + 1 = 2",
        format_trace("none", "2"),
    ):
        assert swap_answer(text, random.Random(0)) is None


def test_nudge_answer():
    assert results(nudge_answer, TRACE) == {TRACE.replace(">72<", f">{n}<") for n in (69, 70, 71, 73, 74, 75)}
    assert results(nudge_answer, format_trace("x", "B"), options="ABC") == {format_trace("x", o) for o in "AC"}
    assert results(nudge_answer, format_trace("x", "b. Paris"), options="AB") == {format_trace("x", "A")}
    assert nudge_answer(format_trace("x", "two"), random.Random(0)) is None
    assert nudge_answer("12", random.Random(0)) is None


def test_another_kind_is_drawn_when_one_cannot_apply():
    text = format_trace("no numbers here", "12")
    kinds = {perturb(text, random.Random(seed)).kind for seed in range(50)}
    assert kinds == {"nudge_answer"}
    assert perturb("no numbers here", random.Random(0)) is None
    assert perturb(text, random.Random(0), ("flip_operator", "swap_answer")) is None


def test_all_kinds_are_drawn_and_repeated_names_more_often():
    drawn = [perturb(TRACE, random.Random(seed)).kind for seed in range(400)]
    assert {kind: 60 < drawn.count(kind) < 140 for kind in KINDS} == dict.fromkeys(KINDS, True)
    heavy = [perturb(TRACE, random.Random(s), ("flip_operator", "swap_answer", "swap_answer")).kind for s in range(300)]
    assert 160 < heavy.count("swap_answer") < 240


def test_unknown_kind_is_a_user_error():
    with pytest.raises(UserError, match="did you mean 'flip_operator'"):
        perturb(TRACE, random.Random(0), ("flip_operators",))


@given(traces, st.integers(0, 10**6), st.booleans())
def test_every_perturbation_changes_the_text_where_it_says_and_keeps_the_tags(text, seed, carry):
    change = perturb(text, random.Random(seed), propagate=propagate_numbers if carry else None)
    assert change.text != text
    assert change.text[: change.first_changed] == text[: change.first_changed]
    assert change.text[change.first_changed] != text[change.first_changed]
    assert [change.text.count(tag) for tag in TAGS] == [1, 1, 1, 1]
    assert change.text.count("\n") == text.count("\n")
    assert change == perturb(text, random.Random(seed), propagate=propagate_numbers if carry else None)
    if change.kind in ("swap_answer", "nudge_answer"):
        assert parse_number(extract_answer(change.text)) != parse_number(extract_answer(text))
        assert not change.propagated


@given(st.text(max_size=80), st.integers(0, 1000))
def test_any_text_is_either_changed_or_refused(text, seed):
    change = perturb(text, random.Random(seed), propagate=propagate_numbers)
    assert change is None or change.text != text


# ---- propagation in free text ----


def carried(before, after, kind="corrupt_number"):
    first = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    return propagate_numbers(before, Perturbation(after, first, kind))


def test_a_changed_result_reaches_later_lines_and_the_answer():
    text = format_trace("2 * 9 = 18 eggs\nShe sells 18 - 3 = 15\nAt $2 that is 15*2=$30", "30")
    wrong = text.replace("= 18 eggs", "= 20 eggs")
    assert carried(text, wrong) == format_trace("2 * 9 = 20 eggs\nShe sells 20 - 3 = 17\nAt $2 that is 17*2=$34", "34")


def test_a_changed_operand_or_operator_recomputes_its_own_line():
    text = format_trace("5 + 7 = 12 of 1,000\n12 x 1,000 = 12,000 grams", "12000")
    assert carried(text, text.replace("5 + 7", "5 + 9")) == format_trace(
        "5 + 9 = 14 of 1,000\n14 x 1,000 = 14,000 grams", "14000"
    )
    assert carried(text, text.replace("5 + 7", "5 - 7"), "flip_operator") is None  # -2 x 1,000 is no plain expression
    text = format_trace("8 - 3 = 5\nso 5 a day, 0.5 an hour", "5")
    assert carried(text, text.replace("8 - 3", "8 + 3"), "flip_operator") == format_trace(
        "8 + 3 = 11\nso 11 a day, 0.5 an hour", "11"
    )


def test_decimals_and_thirds():
    text = format_trace("12 / 60 = $0.2\n0.2 x 50 = $10", "10")
    assert carried(text, text.replace("= $0.2", "= $0.3")) == format_trace("12 / 60 = $0.3\n0.3 x 50 = $15", "15")
    text = format_trace("3 * 2 = 6", "6")
    assert carried(text, text.replace("3 * 2", "2 / 3"), "flip_operator") is None


def test_earlier_text_stays_and_answers_carry_nothing():
    text = format_trace("4 of 4\n4 + 4 = 8\n", "8")
    wrong = text.replace("= 8", "= 9")
    assert carried(text, wrong) == format_trace("4 of 4\n4 + 4 = 9", "9")
    assert carried(text, text.replace(">8<", ">9<")) is None
    assert carried(format_trace("4 cats", "8"), format_trace("5 cats", "8")) is None

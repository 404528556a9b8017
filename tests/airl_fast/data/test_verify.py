"""Answers: numbers, options, expressions and format signals."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airl_fast.data.tags import extract_answer, format_trace, thought_span
from airl_fast.data.verify import (
    answers_equal,
    canonical_answer,
    format_number,
    format_signals,
    named_options,
    option_correct,
    parse_number,
    safe_arithmetic,
)

# ---- extraction ----


def test_canonical_form_is_exact():
    assert format_trace(" a\nb \n", " 72 ") == "<think>\na\nb\n</think>\n<answer>72</answer>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nx\n</think>\n<answer> 72 </answer>", "72"),
        ("<think>x</think><answer>1</answer><answer>2</answer>", "1"),
        ("<think><answer>1</answer></think><answer>2</answer>", "2"),
        ("<think><answer>1</answer></think>", None),
        ("<answer>3</answer> and then 4", "3"),
        ("the answer is 72", None),
        ("<think>x</think><answer>72", None),
        ("<think>x</think>72</answer>", None),
        ("<answer></answer>", ""),
        ("<answer>a\nb</answer>", "a\nb"),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


def test_thought_span_of_incomplete_texts():
    for text, thoughts in [
        ("<think>a</think><answer>b</answer>", "a"),
        ("a</think><answer>b</answer>", "a"),
        ("<think>a<answer>b</answer>", "a"),
        ("<think>a", "a"),
        ("a", "a"),
    ]:
        assert text[slice(*thought_span(text))] == thoughts


# ---- numbers ----


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[("72", "72"), ("72.0", "72"), ("72.", "72"), ("072", "72"), ("+72", "72"), ("$72", "72"), ("72%", "72")],
        *[("1,000", "1000"), ("$1,000.00", "1000"), ("1000", "1,000"), (".5", "0.50"), ("−3", "-3"), ("-$5", "-5")],
        *[("$-5", "-5"), ("$ 18", "18"), (" 7 ", "7"), ("€20", "20"), ("-0", "0"), ("Paris.", " paris ")],
    ],
)
def test_equal_answers(answer, gold):
    assert answers_equal(answer, gold)
    assert canonical_answer(answer) == canonical_answer(gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        *[(None, "72"), ("", "72"), ("  ", ""), ("72 clips", "72"), ("7 2", "72"), ("1,00", "100"), ("10,00", "1000")],
        *[("72.01", "72"), ("-72", "72"), ("72 or 73", "72"), ("--3", "3"), ("1e3", "1000"), ("0x48", "72")],
        *[("७२", "72"), ("-$-5", "5"), ("$", "0"), (".", "0"), ("%", "0"), ("1/2", "0.5"), ("9" * 5000, "9")],
    ],
)
def test_unequal_answers(answer, gold):
    assert not answers_equal(answer, gold)


@given(st.fractions(min_value=-(10**9), max_value=10**9, max_denominator=1))
def test_every_spelling_of_an_integer_is_the_same_number(value):
    number = int(value)
    spellings = [f"{number}", f"{number:,}", f"{number}.00", f" {number} ", f"{number}%", f"{number}".replace("-", "−")]
    assert {parse_number(text) for text in spellings} == {value}


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_format_and_parse_are_inverse(units, decimals):
    value = Fraction(units, 10**decimals)
    text = format_number(value)
    assert parse_number(text) == value
    assert not text.endswith(".") and text != "-0"


def test_numbers_without_a_finite_decimal():
    assert format_number(Fraction(1, 3)) is None
    assert format_number(Fraction(-1, 8)) == "-0.125"


@given(st.text(max_size=80))
def test_reading_a_number_never_raises(text):
    value = parse_number(text)
    assert value is None or isinstance(value, Fraction)


# ---- multiple choice ----

OPTIONS = {"A": "Paris", "B": "New  York", "C": "42", "D": "Vitamin A", "E": "Paris and New York"}


@pytest.mark.parametrize(
    "answer",
    ["B", "b", "(B)", "B.", "B)", "[B]", "Option B", "the answer is (B).", "New York", "new york.", "B. New York"],
)
def test_ways_to_name_one_option(answer):
    assert named_options(answer, OPTIONS) == {"B"}
    assert option_correct(answer, "B", OPTIONS)
    assert not option_correct(answer, "A", OPTIONS)


@pytest.mark.parametrize(
    "answer",
    [
        "A, B",
        "A and B",
        "A or B",
        "A/B",
        "(A) (B)",
        "B. Paris",
        "B. New York or A",
        "B: not A",
        "A. Paris and New York",
        "AB",
    ],
)
def test_several_options_are_wrong_for_all(answer):
    assert not any(option_correct(answer, gold, OPTIONS) for gold in OPTIONS)


@pytest.mark.parametrize("answer", [None, "", "London", "F", "I think so", "because"])
def test_no_option_is_wrong(answer):
    assert not any(option_correct(answer, gold, OPTIONS) for gold in OPTIONS)


def test_option_texts_that_contain_letters_or_numbers():
    assert option_correct("42.0", "C", OPTIONS)
    assert option_correct("Vitamin A", "D", OPTIONS)
    assert option_correct("D. Vitamin A", "D", OPTIONS)
    assert option_correct("Paris and New York", "E", OPTIONS)


def test_options_with_one_text_are_right_when_the_gold_is_among_them():
    twins = {"A": "none", "B": "some", "C": " none"}
    assert option_correct("None", "A", twins) and option_correct("none", "C", twins)
    assert not option_correct("none", "B", twins)


def test_case_tells_options_apart_only_where_they_differ_by_nothing_else():
    genotypes = {"A": "Bb", "B": "bb", "C": "BB"}
    assert [option_correct(text, "B", genotypes) for text in ("bb", "Bb", "BB", "bB")] == [True, False, False, False]
    assert not option_correct("A or B", "B", genotypes)


@given(st.text(max_size=60), st.sampled_from("ABCDE"))
def test_naming_options_never_raises_and_names_only_options(answer, gold):
    assert named_options(answer, OPTIONS) <= set(OPTIONS)
    option_correct(answer, gold, OPTIONS)


# ---- expressions ----


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("(3 + 5) * 2", 16, (3, 5, 2)),
        ("7 / 2 - 1", Fraction(5, 2), (7, 2, 1)),
        ("3 × 4 ÷ 2 − 1", 5, (3, 4, 2, 1)),
        (" 24 ", 24, (24,)),
    ],
)
def test_expressions(text, value, numbers):
    expression = safe_arithmetic(text)
    assert (expression.value, expression.numbers) == (value, numbers)


@pytest.mark.parametrize(
    "text",
    [
        *[
            "",
            "2 ** 3",
            "7 // 2",
            "-3 + 4",
            "+3",
            "1 / 0",
            "1 / (2 - 2)",
            "5(3)",
            "(3, 4)",
            "3 4",
            "1_000",
            "0x10",
            "1e5",
        ],
        *[
            "1.5 + 2",
            "True",
            "abs(3)",
            "__import__('os')",
            "3 + 4 = 7",
            "(((",
            "٣ + 4",
            "05 + 1",
            "9" * 500,
            "1;2",
            "~1",
        ],
        *["(" * 150 + "1" + ")" * 150, "1+" * 120 + "1", "[1][0]", "a", "lambda: 1"],
    ],
)
def test_everything_else_is_no_expression(text):
    assert safe_arithmetic(text) is None


@given(st.text(alphabet="0123456789+-*/() \n", max_size=300))
def test_expressions_never_raise_and_their_literals_are_in_the_text(text):
    expression = safe_arithmetic(text)
    if expression is not None:
        assert all(str(number) in text for number in expression.numbers)


@given(st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 99)), min_size=1, max_size=8))
def test_integer_expressions_have_pythons_value(terms):
    text = "1" + "".join(f" {sign} {number}" for sign, number in terms)
    value, product, pending = 0, 1, 1  # worked out term by term: products bind first
    for sign, number in terms:
        if sign == "*":
            product *= number
        else:
            value, product, pending = value + pending * product, number, 1 if sign == "+" else -1
    assert safe_arithmetic(text).value == value + pending * product


# ---- format ----


@pytest.mark.parametrize(
    ("text", "strict", "soft", "xml", "integer"),
    [
        (format_trace("1 + 1 = 2", "2"), True, True, 1.0, True),
        ("<think>a</think><answer>2.5</answer>", False, True, 1.0, False),
        ("<think>\na\n</think>\n<answer>2</answer>\n", False, True, 0.999, True),
        ("x<think>\na\n</think>\n<answer>-1,000</answer>", False, False, 1.0, True),
        ("<think>a</think> so <answer>2</answer>", False, False, 1.0, True),
        ("<think><think>a</think><answer>b</answer>", False, True, 0.75, False),
        ("<think>\n\n</think>\n<answer>2</answer>", False, True, 1.0, True),
        ("<think>\na\n</think>\n<answer>2 </answer>", False, True, 1.0, True),
        ("<think>a", False, False, 0.25, False),
        ("2", False, False, 0.0, False),
        (format_trace("a", "2") + "z" * 5000, False, True, 0.0, True),
    ],
)
def test_format_signals(text, strict, soft, xml, integer):
    signals = format_signals(text)
    assert (signals.strict, signals.soft, signals.integer) == (strict, soft, integer)
    assert signals.xml == pytest.approx(xml)


@given(
    st.text(min_size=1).filter(lambda s: s.strip() and "<" not in s), st.text(min_size=1).filter(lambda s: s.strip())
)
def test_every_canonical_trace_is_strict(thoughts, answer):
    if not any(mark in answer for mark in "<>"):
        assert format_signals(format_trace(thoughts, answer)).strict

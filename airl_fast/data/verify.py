"""Is an answer right? Numbers compare as numbers, options as options, expressions by safe arithmetic.

Nothing here executes model output: numbers are matched by a regular expression with a length limit, expressions are
parsed to a syntax tree of which only + - * / over integer literals is accepted.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from airl_fast.data.tags import ANSWER_CLOSE, TAGS, answer_span, extract_answer

MAX_NUMBER_CHARS = 64
MAX_EXPRESSION_CHARS = 200

_MINUS = str.maketrans({"−": "-", "–": "-", "‐": "-", "‑": "-", "﹣": "-", "－": "-"})
_NUMBER = re.compile(
    r"(?P<sign>[+-]?)\s*(?P<currency>[$€£]?)\s*(?P<inner>[+-]?)"
    r"(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?:\.(?P<decimals>\d*))?\s*%?\.?",
    re.ASCII,
)


def parse_number(text: str) -> Fraction | None:
    """The number that the whole text spells, or None.

    Reads signs (Unicode minus too), thousands commas, a currency sign, a percent sign (dropped: "50%" is 50) and
    decimals ("72.0", ".5", "72."). Words and units make it no number, and so does anything over 64 characters.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    match = _NUMBER.fullmatch(text.translate(_MINUS).strip())
    if match is None or not (match["whole"] or match["decimals"]):
        return None
    if match["inner"] and (match["sign"] or not match["currency"]):
        return None
    whole = (match["whole"] or "0").replace(",", "")
    decimals = match["decimals"] or ""
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    return -value if "-" in (match["sign"], match["inner"]) else value


def format_number(value: Fraction) -> str | None:
    """Shortest decimal spelling ("72", "-0.25"), or None for a number without a finite one ("1/3")."""
    scale = 0
    while (value * 10**scale).denominator != 1:
        scale += 1
        if scale > 12:
            return None
    digits = str(abs(int(value * 10**scale))).rjust(scale + 1, "0")
    text = digits[:-scale] + "." + digits[-scale:] if scale else digits
    return "-" + text if value < 0 else text


def normalise_text(text: str) -> str:
    """Case, repeated blanks and a final full stop do not distinguish answers."""
    return " ".join(text.translate(_MINUS).split()).casefold().rstrip(".").rstrip()


def answers_equal(answer: str | None, gold: str) -> bool:
    """Equal as numbers where both are numbers, else as normalised text. None and the empty answer are wrong."""
    if answer is None or not answer.strip():
        return False
    number, gold_number = parse_number(answer), parse_number(gold)
    if number is not None and gold_number is not None:
        return number == gold_number
    return normalise_text(answer) == normalise_text(gold)


def canonical_answer(answer: str | None) -> str | None:
    """One spelling for equal answers, so that majority vote can count them ("$72.0" and "72" are one)."""
    if answer is None or not answer.strip():
        return None
    number = parse_number(answer)
    return normalise_text(answer) if number is None else (format_number(number) or str(number))


# ---- multiple choice ----

_LEAD_IN = re.compile(
    r"(?:(?:the )?(?:correct |final |best )*(?:option|answer|choice)s?(?: is| are)?\b[\s:]*)?(.*)", re.IGNORECASE
)
_LETTER = re.compile(r"[(\[]?([A-Z])[)\].:]*", re.IGNORECASE)
_LETTER_THEN_TEXT = re.compile(r"[(\[]?([A-Z])(?:[)\].:]+|\s+-)\s*(\S.*)", re.IGNORECASE | re.DOTALL)
_SEPARATOR = re.compile(r"\s*(?:,|/|&|;|\band\b|\bor\b|\s)\s*", re.IGNORECASE)
_STANDALONE_CAPITAL = re.compile(r"(?<![\w'’])([A-Z])(?![\w'’])")


def named_options(answer: str, options: Mapping[str, str]) -> frozenset[str]:
    """Letters of the options that the answer names, empty when it names none.

    Accepts a letter ("C", "(c)", "Option C."), a letter with its text ("C. Paris"), the full text of an option, or
    several of these, which the caller treats as wrong. Options that share one text are all named by it.
    """
    letters = set(options)
    bare = _LEAD_IN.fullmatch(" ".join(answer.split())).group(1)
    parts = [_LETTER.fullmatch(part) for part in _SEPARATOR.split(bare) if part]
    if parts and all(parts):
        named = {part.group(1).upper() for part in parts}
        if named <= letters:
            return frozenset(named)
    # Case can matter ("Bb" and "bb" are two genotypes): only when no option is spelt like this may it differ.
    exact = frozenset(letter for letter, text in options.items() if _one_line(text) == _one_line(answer))
    whole = exact or frozenset(letter for letter, text in options.items() if answers_equal(answer, text))
    if whole:
        return whole
    match = _LETTER_THEN_TEXT.fullmatch(bare)
    if match is None or match.group(1).upper() not in letters:
        return frozenset()
    letter, rest = match.group(1).upper(), match.group(2)
    return frozenset({letter} | _named_beside(letter, rest, options))


def _named_beside(letter: str, rest: str, options: Mapping[str, str]) -> set[str]:
    """Other options named in the text that follows a letter; the letter's own option text is skipped first."""
    own = _one_line(options[letter])
    if answers_equal(rest, own):
        return set()
    if rest.casefold().startswith(own.casefold()):
        rest = rest[len(own) :]
    others = {capital for capital in _STANDALONE_CAPITAL.findall(rest) if capital in options}
    flat = normalise_text(rest)
    for other, text in options.items():
        words = normalise_text(text)
        if answers_equal(rest, text) or (len(words) > 3 and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", flat)):
            others.add(other)
    return others - {letter}


def option_correct(answer: str | None, gold: str, options: Mapping[str, str]) -> bool:
    """True when the answer names the gold option and no other. gold: its letter."""
    if answer is None:
        return False
    named = named_options(answer, options)
    if named == {gold}:
        return True
    # One text shared by several options names them all; it is right when the gold is among them.
    return gold in named and len({_one_line(options[letter]) for letter in named}) == 1


def _one_line(text: str) -> str:
    return " ".join(text.split())


# ---- arithmetic expressions ----

_EXPRESSION = re.compile(r"[\d\s+\-*/()]+", re.ASCII)
_OPERATORS = str.maketrans({"×": "*", "·": "*", "÷": "/"} | {chr(key): value for key, value in _MINUS.items()})


@dataclass(frozen=True, slots=True)
class Expression:
    """An evaluated expression: its exact value and its integer literals from left to right."""

    value: Fraction
    numbers: tuple[int, ...]


def safe_arithmetic(text: str) -> Expression | None:
    """Evaluate + - * / and parentheses over non-negative integers; None for anything else.

    No powers, floor division, signs, names or calls; at most 200 characters; division by zero is None. The syntax
    tree is walked, never executed, so the cost is linear in the text.
    """
    text = text.translate(_OPERATORS).strip()
    if len(text) > MAX_EXPRESSION_CHARS or not _EXPRESSION.fullmatch(text):
        return None
    try:
        tree = ast.parse(text, mode="eval").body
        numbers: list[int] = []
        return Expression(_evaluate(tree, numbers), tuple(numbers))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, numbers), _evaluate(node.right, numbers)
        match node.op:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
    raise ValueError("only + - * / over integers")


# ---- format ----

_STRICT = re.compile(
    r"<think>\n(?!\s)((?!</?think>|</?answer>).)+(?<!\s)\n</think>\n<answer>[^<>\s](?:[^<>]*[^<>\s])?</answer>",
    re.DOTALL,
)
_SOFT = re.compile(r"\s*<think>.*?</think>\s*<answer>.*?</answer>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class FormatSignals:
    """What can be checked without knowing the answer; the parts of the usual GSM8K GRPO reward, each in [0, 1].

    strict: the text is exactly the canonical form (`format_trace`), nothing before or after, each tag once.
    soft: it opens with a think block followed by an answer block, any blanks between, anything after.
    xml: a quarter for each of the four tags that occurs exactly once, minus 0.001 for each character after the
    first `</answer>`, not below 0.
    integer: the extracted answer is a whole number.
    """

    strict: bool
    soft: bool
    xml: float
    integer: bool


def format_signals(text: str) -> FormatSignals:
    """All four signals of one completion (without its end-of-turn token)."""
    span = answer_span(text)
    closing = text.find(ANSWER_CLOSE)
    trailing = 0 if closing < 0 else len(text) - closing - len(ANSWER_CLOSE)
    number = None if span is None else parse_number(extract_answer(text))
    return FormatSignals(
        strict=_STRICT.fullmatch(text) is not None,
        soft=_SOFT.match(text) is not None,
        xml=max(0.0, sum(0.25 for tag in TAGS if text.count(tag) == 1) - 0.001 * trailing),
        integer=number is not None and number.denominator == 1,
    )

"""Small edits that break a trace: the discriminator's extra negatives.

Four kinds after R-AIRL (Fanconi et al., arXiv 2510.01857). Each edits one place outside the tags, remembers where,
and returns None when the text offers no such place. The place is a free label for localisation.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches

from airl_fast.data.tags import answer_span, thought_span
from airl_fast.data.verify import parse_number
from airl_fast.errors import UserError

# A literal without its sign. Not part of a word, a longer number or a date-like chain.
NUMBER = r"(?<![\w.,])(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?!\w|[.,]\d)"
_LITERAL = re.compile(NUMBER)
_RESULT = re.compile(r"=\s*[$€£]?(-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)(?!\w|[.,]\d)")
# An operator between two operands of an equation: something numeric before, something numeric after, "=" later on.
_OPERATOR = re.compile(r"(?<=[\d)%])\s*([+*/×÷−–-]|(?<=\s)x(?=\s))(?=\s*[-$€£(]*\.?\d)(?=[^\n]*=)")
_LIST_NUMBER = re.compile(r"[.)]\s")
_FLIP = {"+": "-", "-": "+", "−": "+", "–": "+", "*": "/", "/": "*", "×": "÷", "÷": "×", "x": "/"}
_OFFSETS = (-3, -2, -1, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Perturbation:
    """A perturbed text.

    first_changed: character offset in `text` of the first character that differs from the original.
    propagated: whether later text was rewritten to follow from the error.
    """

    text: str
    first_changed: int
    kind: str
    propagated: bool = False


Propagate = Callable[[str, Perturbation], str | None]


def flip_operator(text: str, rng: random.Random, options: str = "") -> Perturbation | None:
    """Flip + and -, or * and /, in one equation of the thoughts."""
    start, end = thought_span(text)
    spots = [match.span(1) for match in _OPERATOR.finditer(text, start, end)]
    if not spots:
        return None
    left, right = rng.choice(spots)
    return _edit(text, left, right, _FLIP[text[left:right]], "flip_operator")


def corrupt_number(text: str, rng: random.Random, options: str = "") -> Perturbation | None:
    """Add a small offset to one number of the thoughts: 1 to 3 units of its last written digit, never below 0."""
    return _corrupt_literal(text, *thought_span(text), rng, "corrupt_number")


def swap_answer(text: str, rng: random.Random, options: str = "") -> Perturbation | None:
    """Put an earlier intermediate number in place of the answer: a result where the thoughts have one."""
    span = answer_span(text)
    answer = None if span is None else parse_number(text[span[0] : span[1]])
    if answer is None:
        return None
    start, end = thought_span(text)
    for pattern in (_RESULT, _LITERAL):
        found = [match.group(match.lastindex or 0) for match in pattern.finditer(text, start, min(end, span[0]))]
        others = sorted({number for number in found if parse_number(number) != answer})
        if others:
            return _edit(text, *span, rng.choice(others), "swap_answer")
    return None


def nudge_answer(text: str, rng: random.Random, options: str = "") -> Perturbation | None:
    """Offset one number of the answer, or, with `options` ("ABC"), name another one of them."""
    span = answer_span(text)
    if span is None:
        return None
    if not options:
        return _corrupt_literal(text, *span, rng, "nudge_answer")
    answer = text[span[0] : span[1]].strip()
    others = [letter for letter in options if not re.match(rf"\W*{letter}\b", answer, re.IGNORECASE)]
    return _edit(text, *span, rng.choice(others), "nudge_answer") if others else None


PERTURBATIONS = {
    "flip_operator": flip_operator,
    "corrupt_number": corrupt_number,
    "swap_answer": swap_answer,
    "nudge_answer": nudge_answer,
}
KINDS = tuple(PERTURBATIONS)


def perturb(
    text: str,
    rng: random.Random,
    kinds: Sequence[str] = KINDS,
    *,
    propagate: Propagate | None = None,
    options: str = "",
) -> Perturbation | None:
    """Draw a kind, and another while it cannot apply; None when none can. Deterministic given `rng`'s state.

    kinds: names of `PERTURBATIONS`; a name given twice is drawn twice as often. propagate(original, perturbation)
    returns the text with the error carried on, or None when there is nothing to carry. options: the letters of
    the wrong options when the answer is one of several. Raises UserError for an unknown kind.
    """
    check_kinds(kinds)
    for kind in rng.sample(list(kinds), len(kinds)):
        change = PERTURBATIONS[kind](text, rng, options)
        if change is None:
            continue
        carried = None if propagate is None else propagate(text, change)
        if carried is None or carried == change.text or carried == text:
            return change
        return replace(change, text=carried, first_changed=_first_difference(text, carried), propagated=True)
    return None


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise UserError unless every kind is a known name."""
    for kind in kinds:
        if kind not in PERTURBATIONS:
            close = get_close_matches(str(kind), KINDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use some of {', '.join(KINDS)}."
            raise UserError(f"unknown perturbation {kind!r}: {hint}")


def literals(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Character ranges of the numbers in text[start:end], list numbers at the start of a line left out."""
    found = []
    for match in _LITERAL.finditer(text, start, end):
        at_line_start = not text[text.rfind("\n", 0, match.start()) + 1 : match.start()].strip()
        if not (at_line_start and _LIST_NUMBER.match(text, match.end())):
            found.append(match.span())
    return found


def _corrupt_literal(text: str, start: int, end: int, rng: random.Random, kind: str) -> Perturbation | None:
    spots = literals(text, start, end)
    if not spots:
        return None
    left, right = rng.choice(spots)
    return _edit(text, left, right, _offset_literal(text, left, right, rng), kind)


def _offset_literal(text: str, left: int, right: int, rng: random.Random) -> str:
    """The literal moved by a small offset, written with the same decimals and commas."""
    literal = text[left:right]
    whole, _, decimals = literal.partition(".")
    units = int(whole.replace(",", "") + decimals)
    # "-1" must not become "-0": after a sign the literal stays positive.
    least = 1 if text[left - 1 : left] in ("-", "−", "–") else 0
    units += rng.choice([offset for offset in _OFFSETS if units + offset >= least])
    digits = str(units).rjust(len(decimals) + 1, "0")
    whole, decimals = (digits[: -len(decimals)], digits[-len(decimals) :]) if decimals else (digits, "")
    if "," in literal:
        whole = f"{int(whole):,}"
    return f"{whole}.{decimals}" if decimals else whole


def _edit(text: str, left: int, right: int, new: str, kind: str) -> Perturbation:
    changed = text[:left] + new + text[right:]
    return Perturbation(changed, _first_difference(text, changed), kind)


def _first_difference(before: str, after: str) -> int:
    """Offset of the first differing character of `after`; its last character when it is a prefix of `before`."""
    for offset, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            return offset
    return max(0, min(len(before), len(after) - 1))

"""Carry an error on: rewrite what follows a perturbed number or operator so that it follows from the error.

A perturbed trace whose later lines contradict the error is easy to spot by its seam; one that carries the error on
can only be spotted where the error is.
"""

import re
from fractions import Fraction

from airl_fast.data.perturb import NUMBER, Perturbation, literals
from airl_fast.data.tags import thought_span
from airl_fast.data.verify import format_number, parse_number, safe_arithmetic

_BEFORE, _AFTER = r"[$€£( \t]*", r"[)% \t]*"
_SIDE = rf"{_BEFORE}{NUMBER}{_AFTER}(?:[+\-−*/×÷x]{_BEFORE}{NUMBER}{_AFTER})+"
_EQUATION = re.compile(rf"(?P<left>{_SIDE})(?P<equals>=[ \t]*[$€£]?)(?P<right>-?{NUMBER})")
_TOKEN = re.compile(rf"{_EQUATION.pattern}|(?P<number>{NUMBER})")
_LITERAL = re.compile(NUMBER)
_CURRENCY = re.compile(r"[$€£%,]")


def propagate_numbers(original: str, change: Perturbation) -> str | None:
    """Rewrite a free-text trace after a changed number or operator of its thoughts.

    The changed number is replaced wherever it occurs later, the answer included; every later equation of literals
    ("6 * 3 = 18") that this touches is recomputed, and its new result replaces the old one from there on. Returns
    None when the change is in the answer, changes no number, or gives a result without a finite decimal.
    """
    if change.first_changed >= thought_span(change.text)[1]:
        return None
    renamed: dict[Fraction, Fraction] = {}
    edited = _changed_literal(original, change.text)
    if edited is not None:
        (left, right), old = edited
        before, after = parse_number(old), parse_number(change.text[left:right])
        if before is None or after is None:
            return None
        renamed[before] = after
    else:
        left = right = change.first_changed
    line = change.text.rfind("\n", 0, left) + 1
    pieces, done = [], right
    for match in _TOKEN.finditer(change.text, line):
        if match.end() <= left or (match.end("right") <= right and match["right"]):
            continue
        if match["number"] is not None:
            if match.start() >= right:
                pieces += [change.text[done : match.start()], _rename(match["number"], renamed)]
                done = match.end()
            continue
        rewritten = _rewrite_equation(match, renamed, touched=match.start() < right)
        if rewritten is None:
            return None
        keep = max(0, done - match.start())
        pieces += [change.text[done : match.start()], rewritten[keep:]]
        done = match.end()
    text = change.text[:right] + "".join(pieces) + change.text[done:]
    return None if text == change.text else text


def _changed_literal(original: str, changed: str) -> tuple[tuple[int, int], str] | None:
    """Range in `changed` and old spelling of the one literal that differs; None when an operator changed."""
    before, after = literals(original, 0, len(original)), literals(changed, 0, len(changed))
    for old, new in zip(before, after, strict=False):
        if original[slice(*old)] != changed[slice(*new)]:
            return new, original[slice(*old)]
    return None


def _rewrite_equation(match: re.Match[str], renamed: dict[Fraction, Fraction], touched: bool) -> str | None:
    """The equation with renamed operands and a recomputed result; adds old result -> new result to `renamed`.

    touched: the equation holds the perturbation itself, so it stays as it is but for its result. None when the new
    result has no finite decimal spelling.
    """
    left = match["left"]
    if not touched:
        left = _LITERAL.sub(lambda number: _rename(number.group(), renamed), left)
        if left == match["left"]:
            return match.group()
    old, value = parse_number(match["right"]), _evaluate(left)
    if old is None or value is None or format_number(value) is None:
        return None
    if old >= 0 and old != value:
        renamed[old] = value
    return left + match["equals"] + _spell(value, match["right"])


def _rename(literal: str, renamed: dict[Fraction, Fraction]) -> str:
    value = parse_number(literal)
    return _spell(renamed[value], literal) if value in renamed else literal


def _spell(value: Fraction, like: str) -> str:
    """The value with thousands commas where the literal it replaces has them."""
    return f"{int(value):,}" if "," in like and value.denominator == 1 else format_number(value)


def _evaluate(side: str) -> Fraction | None:
    """Value of a left side; decimals are scaled to integers first, because the evaluator takes integers only."""
    bare = _CURRENCY.sub("", side).replace("x", "*").strip()
    scaled = re.sub(r"(\d*)\.(\d+)", lambda m: f"({int(m[1] + m[2])}/{10 ** len(m[2])})", bare)
    scaled = re.sub(r"\b0+(?=\d)", "", scaled)
    expression = safe_arithmetic(scaled)
    return None if expression is None else expression.value

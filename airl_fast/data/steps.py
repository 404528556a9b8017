"""Where reasoning steps end: at a newline or at the end of a sentence.

Offsets are characters relative to the completion, one past the end of each step. They are computed once per text;
rewards, losses and localisation all use them.
"""

import re

from airl_fast.data.tags import TAGS

# A run of line breaks, or sentence punctuation (closing quotes and brackets included) followed by a blank.
_BREAK = re.compile(r"\n(?:\s*\n)?|[.!?]+[\"'”’)\]]*(?=[^\S\n]+(\S))")
_TAG = re.compile("|".join(map(re.escape, TAGS)))
# Never the end of a sentence, and not the end of one when a number follows ("No. 5", but "The answer is no. So").
_BEFORE_NAME = frozenset("e.g i.e eg ie vs cf al viz dr mr mrs ms prof st jr sr u.s u.k".split())  # noqa: SIM905
_BEFORE_NUMBER = frozenset("no nos fig figs eq eqs sec ch vol p pp approx ca resp est".split())  # noqa: SIM905
_LAST_WORD = re.compile(r"[\w.]*$")


def step_ends(text: str) -> list[int]:
    """Offsets one past the end of each step, ascending; the last one is always len(text). Empty text has none.

    A line break belongs to the step it ends. A piece that holds only tags, blanks or punctuation is no step of its
    own: it joins the next one (the opening tag, and the closing tag before the answer) or, at the end, the last.
    Decimals ("3.14"), abbreviations ("e.g."), initials ("J. Doe") and list numbers ("1. Add") end no sentence.
    """
    ends: list[int] = []
    start = 0
    for match in _BREAK.finditer(text):
        is_line = match.group().endswith("\n")
        if not is_line and not _ends_sentence(text, start, match):
            continue
        if _has_content(text[start : match.end()]):
            ends.append(match.end())
            start = match.end()
    if start < len(text):
        if _has_content(text[start:]) or not ends:
            ends.append(len(text))
        else:
            ends[-1] = len(text)
    return ends


def split_steps(text: str) -> list[str]:
    """The text cut at `step_ends`; joining the pieces gives the text back."""
    ends = step_ends(text)
    return [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _has_content(piece: str) -> bool:
    return any(character.isalnum() for character in _TAG.sub("", piece))


def _ends_sentence(text: str, start: int, match: re.Match[str]) -> bool:
    following = match.group(1)
    if following.islower():
        return False
    if match.group()[0] != "." or match.group().startswith(".."):
        return True
    word = _LAST_WORD.search(text, max(start, match.start() - 24), match.start()).group()
    abbreviation = word.lower().strip(".")
    if abbreviation in _BEFORE_NAME or (abbreviation in _BEFORE_NUMBER and following.isdigit()):
        return False
    if len(word) == 1 and word.isupper():
        return False
    is_list_number = word.isdigit() and not _has_content(text[start : match.start() - len(word)])
    return not is_list_number

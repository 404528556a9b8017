"""The one written form of a trace: thoughts in <think>, then the answer in <answer>.

Everything that builds a trace calls `format_trace`; everything that reads an answer calls `answer_span`. No other
file spells the layout out.
"""

import re

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
TAGS = (THINK_OPEN, THINK_CLOSE, ANSWER_OPEN, ANSWER_CLOSE)

_ANSWER = re.compile(re.escape(ANSWER_OPEN) + "(.*?)" + re.escape(ANSWER_CLOSE), re.DOTALL)


def format_trace(thoughts: str, answer: str) -> str:
    """`<think>\\n{thoughts}\\n</think>\\n<answer>{answer}</answer>`, both without outer whitespace."""
    return f"{THINK_OPEN}\n{thoughts.strip()}\n{THINK_CLOSE}\n{ANSWER_OPEN}{answer.strip()}{ANSWER_CLOSE}"


def format_thoughts(thoughts: str) -> str:
    """`<think>\\n{thoughts}\\n</think>`: a trace that names no answer."""
    return f"{THINK_OPEN}\n{thoughts.strip()}\n{THINK_CLOSE}"


def answer_span(text: str) -> tuple[int, int] | None:
    """Character range of the answer's content, or None when no closed answer block exists.

    The first block after the (first) end of the thoughts counts and nothing after it does, so naming several
    answers cannot help; a block inside the thoughts is a thought.
    """
    closed = text.find(THINK_CLOSE)
    match = _ANSWER.search(text, 0 if closed < 0 else closed + len(THINK_CLOSE))
    return match.span(1) if match else None


def extract_answer(text: str) -> str | None:
    """The answer's content without outer whitespace, or None (see `answer_span`)."""
    span = answer_span(text)
    return None if span is None else text[span[0] : span[1]].strip()


def thought_span(text: str) -> tuple[int, int]:
    """Character range of the thoughts.

    Between the tags where they exist. A missing opening tag means from the start; a missing closing tag means up to
    the answer block or the end.
    """
    opened = text.find(THINK_OPEN)
    start = 0 if opened < 0 else opened + len(THINK_OPEN)
    end = text.find(THINK_CLOSE, start)
    if end < 0:
        end = text.find(ANSWER_OPEN, start)
    return start, len(text) if end < 0 else end

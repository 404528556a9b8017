"""Traces of anyone's from JSON Lines, one at a time, with what a scorer may see apart from what it may not.

Three layouts are known by their fields:

- ours: `prompt` and either `completion` (the text as it was written; with `step_ends`, character offsets one past the
  end of each step, the last one its length) or `steps` (a list of strings, put into think tags) with `final_answer`;
  labels `answer` (the gold), `correct`, `first_wrong_step` (0-based, null for none), `group`;
- GSM8K's published model solutions: `question`, `solution`, `pred`, `gold`, `is_correct`;
- BIG-Bench Mistake: `question`, `steps`, `answer`, `gold`, `answer_correct`, `first_error`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from airl_fast.data.files import stream_rows, text_field
from airl_fast.data.gsm8k import clean_steps
from airl_fast.data.tags import THINK_OPEN, format_thoughts, format_trace
from airl_fast.errors import UserError

NO_ERROR = -1
_ANSWER_LINE = re.compile(r"\n?A:[^\n]*\s*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRow:
    """What a scorer sees. place: file:line, for messages. step_ends: character offsets one past the end of each step
    in `text`, where the file gives the steps; None leaves the cut to the task."""

    id: str
    place: str
    prompt: str
    text: str
    step_ends: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceLabels:
    """What a scorer never sees; None where the file does not say. first_wrong_step: NO_ERROR when every step is right.

    gold: the right answer. group: a name for what kind of trace it is (BIG-Bench Mistake's task, a model's name).
    """

    gold: str | None = None
    correct: bool | None = None
    first_wrong_step: int | None = None
    group: str | None = None


def read_traces(path: Path) -> Iterator[tuple[TraceRow, TraceLabels]]:
    """Every row of a file (gzip by extension), read as it is asked for. UserError names file and line of a bad one."""
    for number, row in stream_rows(path):
        yield _layout(path, number, row)(path, number, row)


def parse_trace(path: Path, number: int, row: dict) -> tuple[TraceRow, TraceLabels]:
    """One row that is already an object; `path` and `number` say where it came from."""
    return _layout(path, number, row)(path, number, row)


def _layout(path: Path, number: int, row: dict) -> Callable[[Path, int, dict], tuple[TraceRow, TraceLabels]]:
    if "prompt" in row:
        return _own
    if "question" in row and "solution" in row:
        return _gsm8k_solution
    if "question" in row and "steps" in row:
        return _bigbench_mistake
    raise UserError(
        f"{path}:{number}: no trace in a known layout; give 'prompt' with 'completion', or with 'steps' and "
        "'final_answer'."
    )


def _own(path: Path, number: int, row: dict) -> tuple[TraceRow, TraceLabels]:
    prompt = text_field(path, number, row, "prompt")
    if ("completion" in row) == ("steps" in row):
        raise UserError(f"{path}:{number}: give either 'completion' or 'steps', and one of them only.")
    if "completion" in row:
        text = text_field(path, number, row, "completion")
        ends = _step_ends(path, number, row, len(text))
    else:
        text, ends = join_steps(_steps(path, number, row), _optional(path, number, row, "final_answer"))
    labels = TraceLabels(
        gold=_optional(path, number, row, "answer"),
        correct=_flag(path, number, row, "correct"),
        first_wrong_step=_first_wrong(path, number, row, "first_wrong_step", None if ends is None else len(ends)),
        group=_optional(path, number, row, "group"),
    )
    identifier = row.get("id")
    return _row(path, number, identifier, prompt, text, ends), labels


def _gsm8k_solution(path: Path, number: int, row: dict) -> tuple[TraceRow, TraceLabels]:
    solution = text_field(path, number, row, "solution")
    thoughts = clean_steps(_ANSWER_LINE.sub("", solution)) or clean_steps(solution)
    answer = _optional(path, number, row, "pred")
    text = format_thoughts(thoughts) if answer is None else format_trace(thoughts, answer)
    labels = TraceLabels(
        gold=_optional(path, number, row, "gold"),
        correct=_flag(path, number, row, "is_correct"),
        group=_optional(path, number, row, "model"),
    )
    prompt = text_field(path, number, row, "question").strip()
    return _row(path, number, None, prompt, text, None), labels


def _bigbench_mistake(path: Path, number: int, row: dict) -> tuple[TraceRow, TraceLabels]:
    text, ends = join_steps(_steps(path, number, row), _optional(path, number, row, "answer"))
    labels = TraceLabels(
        gold=_optional(path, number, row, "gold"),
        correct=_flag(path, number, row, "answer_correct"),
        first_wrong_step=_first_wrong(path, number, row, "first_error", len(ends)),
        group=_optional(path, number, row, "task"),
    )
    return _row(path, number, row.get("id"), text_field(path, number, row, "question"), text, ends), labels


def join_steps(steps: list[str], answer: str | None) -> tuple[str, tuple[int, ...]]:
    """Steps as a trace, one a line, and where each ends; the answer belongs to the last."""
    lines = [step.strip() for step in steps]
    thoughts = "\n".join(lines)
    text = format_thoughts(thoughts) if answer is None else format_trace(thoughts, answer)
    ends, position = [], len(THINK_OPEN) + 1
    for line in lines:
        position += len(line) + 1
        ends.append(position)
    return text, (*ends[:-1], len(text))


def _row(path: Path, number: int, identifier: object, prompt: str, text: str, ends: tuple[int, ...] | None) -> TraceRow:
    name = f"{path.name}:{number}" if identifier is None else str(identifier)
    return TraceRow(id=name, place=f"{path}:{number}", prompt=prompt, text=text, step_ends=ends)


def _steps(path: Path, number: int, row: dict) -> list[str]:
    """An empty step among others is allowed: BIG-Bench Mistake has some, and they are counted in its labels."""
    steps = row["steps"]
    if not isinstance(steps, list) or not all(isinstance(s, str) for s in steps) or not "".join(steps).strip():
        raise UserError(f"{path}:{number}: 'steps' must be a list of strings that say something; correct the line.")
    return steps


def _step_ends(path: Path, number: int, row: dict, length: int) -> tuple[int, ...] | None:
    ends = row.get("step_ends")
    if ends is None:
        return None
    rises = isinstance(ends, list) and all(type(end) is int for end in ends) and ends == sorted(set(ends))
    if not rises or not ends or ends[0] < 1 or ends[-1] != length:
        raise UserError(
            f"{path}:{number}: 'step_ends' must be whole numbers that rise from 1 or more to {length}, the length of "
            "'completion' in characters; correct them, or leave them out and the task cuts the steps."
        )
    return tuple(ends)


def _optional(path: Path, number: int, row: dict, key: str) -> str | None:
    value = row.get(key)
    if value is None:
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise UserError(f"{path}:{number}: {key!r} must be a string or a number, not {value!r}.")


def _flag(path: Path, number: int, row: dict, key: str) -> bool | None:
    value = row.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{path}:{number}: {key!r} must be true, false or null, not {value!r}.")
    return value


def _first_wrong(path: Path, number: int, row: dict, key: str, steps: int | None) -> int | None:
    """steps: how many there are, where the file gives them."""
    if key not in row:
        return None
    value = row[key]
    if value is None:
        return NO_ERROR
    if type(value) is not int or value < 0 or (steps is not None and value >= steps):
        within = "" if steps is None else f" below {steps}, the number of steps"
        raise UserError(f"{path}:{number}: {key!r} must be null or a whole number from 0{within}, not {value!r}.")
    return value

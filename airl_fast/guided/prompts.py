"""The prompts to generate for, and their answers, which are kept apart until everything is generated."""

import math
from pathlib import Path

from airl_fast.data.files import stream_rows, text_field
from airl_fast.data.task import Split, Task
from airl_fast.errors import UserError
from airl_fast.guided.records import Problem

Answers = tuple[str | None, ...]


def read_problems(path: Path) -> tuple[tuple[Problem, ...], Answers]:
    """Rows of `prompt` and, optionally, `id` and `answer` (JSON Lines, gzip by extension). UserError names file and
    line of a bad one."""
    problems, answers = [], []
    for number, row in stream_rows(path):
        place = f"{path}:{number}"
        identifier = row.get("id")
        problems.append(
            Problem(
                id=f"{path.name}:{number}" if identifier is None else str(identifier),
                place=place,
                prompt=text_field(path, number, row, "prompt"),
            )
        )
        answers.append(_answer(place, row.get("answer")))
    if not problems:
        raise UserError(f"{path} holds no prompt; write one JSON object with 'prompt' a line.")
    return tuple(problems), tuple(answers)


def split_problems(task: Task, split: Split, limit: int | None) -> tuple[tuple[Problem, ...], Answers]:
    """The first `limit` prompts of a split of the run's task."""
    examples = task.load(split, limit)
    if not examples:
        raise UserError(f"the {split} split of task {task.name!r} holds no prompt; give a file of prompts.")
    problems = tuple(Problem(id=e.id, place=f"{split} prompt {e.id}", prompt=e.prompt) for e in examples)
    return problems, tuple(example.answer for example in examples)


def _answer(place: str, value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise UserError(f"{place}: 'answer' must be a string that says something or a number, not {value!r}.")

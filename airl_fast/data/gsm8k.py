"""GSM8K as published (Cobbe et al. 2021, openai/grade-school-math): `train.jsonl` and `test.jsonl`.

A row holds `question` and `answer`; the answer is one step a line with calculator annotations (`<<48/2=24>>24`) and
the gold after `####`. The annotation is always followed by its value, so deleting it leaves a clean step.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from airl_fast.data.files import data_file, read_rows, refuse_evaluation_file, text_field
from airl_fast.data.splits import carve, check_fractions
from airl_fast.data.tags import format_trace
from airl_fast.data.task import Split, TextTask, check_split
from airl_fast.data.verify import format_number, parse_number
from airl_fast.errors import UserError
from airl_fast.types import Example

_ANNOTATION = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, kw_only=True)
class Gsm8k(TextTask):
    """path: folder of the two files. The development set and, when asked, a warm-start set are carved from train.

    dev_fraction, warmstart_fraction: shares of the training file, drawn by a hash of the question.
    """

    name: ClassVar[str] = "gsm8k"

    path: str | None = None
    dev_fraction: float = 0.05
    warmstart_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_fractions(self.name, self.dev_fraction, self.warmstart_fraction)

    def load(self, split: Split, limit: int | None = None) -> list[Example]:
        check_split(self.name, split)
        if split == "test":
            return read_gsm8k(data_file(self.path, "test.jsonl", task=self.name))[:limit]
        path = data_file(self.path, "train.jsonl", task=self.name)
        refuse_evaluation_file(path)
        return carve(
            read_gsm8k(path),
            split,
            task=self.name,
            dev_fraction=self.dev_fraction,
            warmstart_fraction=self.warmstart_fraction,
        )[:limit]


def read_gsm8k(path: Path) -> list[Example]:
    """All rows of one published file. UserError names the file and line of a malformed one."""
    stem = path.name.split(".")[0]
    return [_example(path, number, row, f"gsm8k/{stem}/{number}") for number, row in read_rows(path)]


def _example(path: Path, number: int, row: dict, identifier: str) -> Example:
    question = text_field(path, number, row, "question")
    solution, mark, gold = text_field(path, number, row, "answer").rpartition("####")
    value = parse_number(gold)
    if not mark or value is None:
        raise UserError(f"{path}:{number}: 'answer' does not end in '#### <number>'; use the file as published.")
    answer = format_number(value)
    expert = format_trace(clean_steps(solution), answer)
    return Example(id=identifier, prompt=question.strip(), answer=answer, expert=expert)


def clean_steps(solution: str) -> str:
    """The solution without calculator annotations, blank lines and blanks at line ends."""
    lines = (" ".join(line.split()) for line in _ANNOTATION.sub("", solution).splitlines())
    return "\n".join(line for line in lines if line)

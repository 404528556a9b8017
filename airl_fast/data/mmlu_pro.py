"""MMLU-Pro (Wang et al. 2024, TIGER-AI-Lab): `val_cot.jsonl` with 70 worked solutions, `test.jsonl.gz` to evaluate.

Rows hold question, options (up to ten), answer (a letter), category and, in the validation file, cot. Only the
validation file is ever training data.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from airl_fast.data.files import data_file, read_rows, refuse_evaluation_file, text_field
from airl_fast.data.multiple_choice import LETTERS, MultipleChoice, render_prompt
from airl_fast.data.splits import carve, check_fractions
from airl_fast.data.tags import format_trace
from airl_fast.data.task import Split, check_split
from airl_fast.errors import UserError
from airl_fast.types import Example

_OPENING = re.compile(r"\s*(?:A:\s*)?(?:Let's think step by step\.\s*)?")
_CONCLUSION = re.compile(r"\s*The answer is \(([A-J])\)\.?\s*$")


@dataclass(frozen=True, kw_only=True)
class MmluPro(MultipleChoice):
    """path: folder of the two files. dev_fraction, warmstart_fraction: shares of the validation file."""

    name: ClassVar[str] = "mmlu_pro"

    path: str | None = None
    dev_fraction: float = 0.2
    warmstart_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_fractions(self.name, self.dev_fraction, self.warmstart_fraction)

    def load(self, split: Split, limit: int | None = None) -> list[Example]:
        check_split(self.name, split)
        if split == "test":
            return read_mmlu_pro(data_file(self.path, "test.jsonl", task=self.name))[:limit]
        path = data_file(self.path, "val_cot.jsonl", task=self.name)
        refuse_evaluation_file(path)
        return carve(
            read_mmlu_pro(path),
            split,
            task=self.name,
            dev_fraction=self.dev_fraction,
            warmstart_fraction=self.warmstart_fraction,
        )[:limit]


def read_mmlu_pro(path: Path) -> list[Example]:
    """All rows of one file; a row with a chain of thought becomes a demonstration."""
    stem = path.name.split(".")[0]
    return [_example(path, number, row, f"mmlu_pro/{stem}/{number}") for number, row in read_rows(path)]


def _example(path: Path, number: int, row: dict, identifier: str) -> Example:
    question = text_field(path, number, row, "question")
    answer = text_field(path, number, row, "answer")
    texts = row.get("options")
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS) or not all(isinstance(t, str) for t in texts):
        raise UserError(f"{path}:{number}: 'options' must be a list of 2 to {len(LETTERS)} strings; correct the line.")
    options = dict(zip(LETTERS, texts, strict=False))
    if answer not in options:
        raise UserError(f"{path}:{number}: 'answer' is {answer!r}, not the letter of an option; correct the line.")
    expert = clean_cot(text_field(path, number, row, "cot"), answer) if row.get("cot") is not None else None
    return Example(id=identifier, prompt=render_prompt(question, options), answer=answer, expert=expert)


def clean_cot(cot: str, gold: str) -> str:
    """A demonstration from "A: Let's think step by step. … The answer is (C)."

    Its answer is the letter the text itself concludes, so that the verifier can find one that is wrong; the gold
    where it concludes none.
    """
    thoughts = cot[_OPENING.match(cot).end() :]
    conclusion = _CONCLUSION.search(thoughts)
    if conclusion is None:
        return format_trace(thoughts, gold)
    return format_trace(thoughts[: conclusion.start()] or thoughts, conclusion[1])

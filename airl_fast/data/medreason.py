"""Medical questions: MedMCQA's expert explanations to learn from, MedQA's test questions to evaluate.

`medmcqa_validation.jsonl` (Pal et al. 2022): question, options{}, answer, explanation or null. `medqa_test.jsonl`
(Jin et al. 2021): question, options5/options4, answer5/answer4, no chain of thought.
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

# "Ans. a.", "Answer- B.", "Ans: C (Ref", "Ans. is 'd' i.e.", and with the blank lost: "Ans. BSolitary bone cyst".
_STATED = re.compile(
    r"\W*(?i:ans(?:wer)?)[\s.:\-–]*(?i:is\b|are\b)?[\s.:\-–(\[\"'‘“]*"
    r"(?:([a-dA-D])(?![A-Za-z])|([A-D])(?=[A-Z][a-z]))[\s.:,;\-–)\]\"'’”]*(?:i\.?e\b[\s.:,]*)?"
)


@dataclass(frozen=True, kw_only=True)
class MedReason(MultipleChoice):
    """path: folder of the two files. min_words: shorter explanations are left out. choices: MedQA with 4 or 5 options.

    dev_fraction, warmstart_fraction: shares of the MedMCQA questions that have an explanation.
    """

    name: ClassVar[str] = "medreason"

    path: str | None = None
    min_words: int = 20
    choices: int = 5
    dev_fraction: float = 0.1
    warmstart_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_fractions(self.name, self.dev_fraction, self.warmstart_fraction)
        if self.choices not in (4, 5):
            raise UserError(f"medreason: choices must be 4 or 5, not {self.choices}.")
        if self.min_words < 0:
            raise UserError(f"medreason: min_words must be 0 or more, not {self.min_words}.")

    def load(self, split: Split, limit: int | None = None) -> list[Example]:
        check_split(self.name, split)
        if split == "test":
            return read_medqa(data_file(self.path, "medqa_test.jsonl", task=self.name), self.choices)[:limit]
        path = data_file(self.path, "medmcqa_validation.jsonl", task=self.name)
        refuse_evaluation_file(path)
        return carve(
            read_medmcqa(path, self.min_words),
            split,
            task=self.name,
            dev_fraction=self.dev_fraction,
            warmstart_fraction=self.warmstart_fraction,
        )[:limit]


def read_medmcqa(path: Path, min_words: int) -> list[Example]:
    """The questions whose explanation has at least `min_words` words after its stated answer is stripped."""
    examples = []
    for number, row in read_rows(path):
        prompt, gold = _question(path, number, row, "options", "answer")
        if row.get("explanation") is None:
            continue
        thoughts, stated = strip_stated_answer(text_field(path, number, row, "explanation"))
        if not thoughts or len(thoughts.split()) < min_words:
            continue
        # The explanation's own letter, so that the verifier can find a demonstration that argues for another option.
        expert = format_trace(thoughts, stated or gold)
        examples.append(Example(id=f"medmcqa/{number}", prompt=prompt, answer=gold, expert=expert))
    return examples


def read_medqa(path: Path, choices: int) -> list[Example]:
    """All questions, with 4 or 5 options; none has a demonstration."""
    examples = []
    for number, row in read_rows(path):
        prompt, gold = _question(path, number, row, f"options{choices}", f"answer{choices}")
        examples.append(Example(id=f"medqa/{number}", prompt=prompt, answer=gold))
    return examples


def strip_stated_answer(explanation: str) -> tuple[str, str | None]:
    """(explanation without "Ans. a" at its start, the letter it stated or None).

    A trace that opens with its answer would show the discriminator nothing but the letter.
    """
    match = _STATED.match(explanation)
    if match is None:
        return explanation.strip(), None
    return explanation[match.end() :].strip(), (match[1] or match[2]).upper()


def _question(path: Path, number: int, row: dict, options_key: str, answer_key: str) -> tuple[str, str]:
    question, gold = text_field(path, number, row, "question"), text_field(path, number, row, answer_key)
    options = row.get(options_key)
    if not isinstance(options, dict) or not all(k in LETTERS and isinstance(v, str) for k, v in options.items()):
        raise UserError(f"{path}:{number}: {options_key!r} must map letters to strings; correct the line.")
    if gold not in options:
        raise UserError(f"{path}:{number}: {answer_key!r} is {gold!r}, not the letter of an option; correct the line.")
    return render_prompt(question, options), gold

"""A user's own data: JSON Lines with `prompt`, `expert` and `answer`.

`path` is one file, from which development and test sets are carved, or a folder with train.jsonl and optionally
dev.jsonl, test.jsonl and warmstart.jsonl (each may end in .gz).
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from airl_fast.data.files import data_file, read_rows, refuse_evaluation_file, text_field
from airl_fast.data.splits import check_fractions, split_of
from airl_fast.data.tags import TAGS, format_trace
from airl_fast.data.task import Split, TextTask, check_split
from airl_fast.errors import UserError
from airl_fast.types import Example

_WHOLE_TRACE = re.compile(r"\s*<think>\s*(\S.*?)\s*</think>\s*<answer>\s*(\S.*?)\s*</answer>\s*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Jsonl(TextTask):
    """path: see above. *_fraction: shares of the training file that stand in for files that are not there."""

    name: ClassVar[str] = "jsonl"

    path: str | None = None
    dev_fraction: float = 0.05
    test_fraction: float = 0.1
    warmstart_fraction: float = 0.0

    def __post_init__(self) -> None:
        check_fractions(self.name, self.dev_fraction + self.test_fraction, self.warmstart_fraction)
        if min(self.dev_fraction, self.test_fraction) < 0:
            raise UserError("task 'jsonl': dev_fraction and test_fraction must be 0 or more.")

    def load(self, split: Split, limit: int | None = None) -> list[Example]:
        check_split(self.name, split)
        files = self._files()
        if split != "train" and split in files:
            return read_jsonl(files[split])[:limit]
        refuse_evaluation_file(files["train"])
        examples = read_jsonl(files["train"])
        held_out = {other: share for other, share in self._shares().items() if other not in files and share > 0}
        if split != "train" and split not in held_out:
            raise UserError(
                f"data.path: {self.path} has no {split}.jsonl and no share is set aside for it; "
                f"add the file or set data.options.{split}_fraction."
            )
        if split == "train":
            self._check_disjoint(examples, files)
        shares = held_out | {"train": 1 - sum(held_out.values())}
        return [example for example in examples if split_of(_key(example), shares) == split][:limit]

    def _shares(self) -> dict[str, float]:
        return {"dev": self.dev_fraction, "test": self.test_fraction, "warmstart": self.warmstart_fraction}

    def _files(self) -> dict[str, Path]:
        if self.path is not None and Path(self.path).is_file():
            return {"train": Path(self.path)}
        files = {"train": data_file(self.path, "train.jsonl", task=self.name)}
        for split in self._shares():
            for candidate in (Path(self.path) / f"{split}.jsonl", Path(self.path) / f"{split}.jsonl.gz"):
                if candidate.is_file():
                    files.setdefault(split, candidate)
        return files

    def _check_disjoint(self, train: list[Example], files: dict[str, Path]) -> None:
        """Raise UserError when a training prompt is also one to evaluate on."""
        seen = {_key(example): example.id for example in train}
        for split in ("dev", "test"):
            for example in read_jsonl(files[split]) if split in files else ():
                if _key(example) in seen:
                    raise UserError(
                        f"{files['train']}: the prompt of {seen[_key(example)]} is also that of {example.id}; "
                        "keep it in one of the two files."
                    )


def read_jsonl(path: Path) -> list[Example]:
    """All rows of one file. UserError names the file and line of the first bad one."""
    return [parse_example(path, number, row) for number, row in read_rows(path)]


def parse_example(path: Path, number: int, row: dict) -> Example:
    """One row as an example; its id is file:line. UserError when a field is missing, empty or of the wrong type.

    prompt: string. answer: string or number. expert: a string, either the thoughts alone, which are closed with
    `answer`, or a whole trace with think and answer tags; null means no demonstration.
    """
    prompt = text_field(path, number, row, "prompt")
    answer = row.get("answer")
    if type(answer) is int or (isinstance(answer, float) and math.isfinite(answer)):
        answer = str(answer)
    else:
        answer = text_field(path, number, row, "answer").strip()
    is_plain = "expert" in row and row["expert"] is None
    expert = None if is_plain else _expert(path, number, text_field(path, number, row, "expert"), answer)
    return Example(id=f"{path.name}:{number}", prompt=prompt, answer=answer, expert=expert)


def _expert(path: Path, number: int, text: str, answer: str) -> str:
    if not any(tag in text for tag in TAGS):
        return format_trace(text, answer)
    match = _WHOLE_TRACE.fullmatch(text)
    if match is None or any(text.count(tag) != 1 for tag in TAGS):
        raise UserError(
            f"{path}:{number}: 'expert' is not of the form <think>…</think><answer>…</answer> with both filled in; "
            "correct it, or give the thoughts alone without tags."
        )
    return format_trace(*match.groups())


def _key(example: Example) -> str:
    return " ".join(example.prompt.split())

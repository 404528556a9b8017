"""Look at data before training on it: what `airl-fast data prepare|validate|preview|perturb` print."""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import unified_diff
from pathlib import Path

from airl_fast.data.files import parse_row, read_text
from airl_fast.data.jsonl import Jsonl, parse_example
from airl_fast.data.perturb import KINDS, check_kinds
from airl_fast.data.task import SPLITS, ExpertReport, Split, Task, check_experts
from airl_fast.errors import UserError
from airl_fast.types import Example


@dataclass(frozen=True, slots=True)
class ValidationReport:
    """What is in a user's file. problems: one sentence each, with file and line; duplicates: prompts seen before."""

    path: str
    rows: int
    usable: int
    problems: tuple[str, ...]
    duplicates: int
    experts: ExpertReport

    @property
    def ok(self) -> bool:
        return not self.problems and not self.experts.failed

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.rows} rows, {self.usable} usable, {len(self.problems)} with a problem"]
        if self.duplicates:
            lines.append(f"{self.duplicates} rows repeat an earlier prompt")
        return "\n".join([*lines, str(self.experts), *self.problems])


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """One split of a task. prompt_chars, expert_chars: the longest. experts: None when the split is not available."""

    split: str
    examples: int
    prompt_chars: int
    expert_chars: int
    experts: ExpertReport | None
    note: str = ""

    def __str__(self) -> str:
        if self.experts is None:
            return f"{self.split}: {self.note}"
        return (
            f"{self.split}: {self.examples} examples, longest prompt {self.prompt_chars} and demonstration "
            f"{self.expert_chars} characters; {self.experts}"
        )


def validate_file(path: str) -> ValidationReport:
    """Check every line of a JSON Lines file of task `jsonl`, and every demonstration against its own answer.

    Unlike loading, which stops at the first mistake, this lists all of them. UserError only when the file itself
    cannot be read.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such file; give a JSON Lines file with prompt, expert and answer.")
    examples: list[Example] = []
    problems: list[str] = []
    rows = 0
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        rows += 1
        try:
            examples.append(parse_example(file, number, parse_row(file, number, line)))
        except UserError as error:
            problems.append(str(error))
    if not rows:
        problems.append(f"{path}: holds no rows; write one JSON object a line.")
    return ValidationReport(
        path=path,
        rows=rows,
        usable=len(examples),
        problems=tuple(problems),
        duplicates=len(examples) - len({example.prompt for example in examples}),
        experts=check_experts(Jsonl(path=path), examples),
    )


def validate_task(task: Task) -> tuple[SplitSummary, ...]:
    """Load every split of a task. A split that is not available says why instead of failing the others."""
    return tuple(_summary(task, split) for split in SPLITS)


def _summary(task: Task, split: Split) -> SplitSummary:
    try:
        examples = task.load(split)
    except UserError as error:
        return SplitSummary(split, 0, 0, 0, None, str(error))
    return SplitSummary(
        split=split,
        examples=len(examples),
        prompt_chars=max((len(example.prompt) for example in examples), default=0),
        expert_chars=max((len(example.expert or "") for example in examples), default=0),
        experts=check_experts(task, examples),
    )


def prepare(task: Task, split: Split, out: str, limit: int | None = None) -> int:
    """Write a split as JSON Lines (prompt, expert, answer) for task `jsonl`; returns the number of rows.

    That task compares answers as numbers or text, so countdown and multiple choice lose their own verifier. The
    test split is refused: a copy of it could be trained on. Raises UserError for an existing or unwritable file.
    """
    if split == "test":
        raise UserError("data prepare: the test split is for evaluation only; prepare train, dev or warmstart.")
    examples = task.load(split, limit)
    target = Path(out)
    if target.exists():
        raise UserError(f"{out}: exists already; choose another name or remove it.")
    partial = target.with_name(target.name + ".part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for example in examples:
                row = {"prompt": example.prompt, "expert": example.expert, "answer": example.answer}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another place.") from error
    return len(examples)


def preview(task: Task, split: Split = "train", n: int = 3) -> str:
    """The first n examples as text, demonstrations cut into their steps."""
    blocks = []
    for example in task.load(split, n):
        lines = [f"== {example.id}   answer: {example.answer}", example.prompt]
        if example.expert is None:
            lines.append("(no demonstration)")
        else:
            ends = task.step_ends(example.expert)
            pieces = [example.expert[a:b] for a, b in zip([0, *ends], ends, strict=False)]
            lines += [f"{index:>3} | {_indent(piece)}" for index, piece in enumerate(pieces)]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def preview_perturbations(
    task: Task,
    split: Split = "train",
    n: int = 3,
    seed: int = 0,
    kinds: Sequence[str] = KINDS,
    propagate_rate: float = 0.5,
) -> str:
    """The first n demonstrations of a split, each with one perturbation as a line diff."""
    check_kinds(kinds)
    rng = random.Random(seed)
    blocks = []
    for example in task.load(split, n):
        if example.expert is None:
            blocks.append(f"== {example.id}   no demonstration")
            continue
        change = task.perturb(example, example.expert, rng, kinds, propagate_rate)
        if change is None:
            blocks.append(f"== {example.id}   no perturbation of {', '.join(kinds)} applies")
            continue
        carried = ", carried on" if change.propagated else ""
        heading = f"== {example.id}   {change.kind}{carried}, first changed character {change.first_changed}"
        before, after = example.expert.split("\n"), change.text.split("\n")
        diff = list(unified_diff(before, after, lineterm="", n=len(before)))[3:]
        blocks.append("\n".join([heading, *diff]))
    return "\n\n".join(blocks)


def _indent(piece: str) -> str:
    return piece.rstrip("\n").replace("\n", "\n    | ")

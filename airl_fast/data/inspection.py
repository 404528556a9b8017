"""Look at data before training on it: what `airl-fast data prepare|validate|preview|perturb` print."""

import json
import os
import random
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    _write_lines(out, ({"prompt": e.prompt, "expert": e.expert, "answer": e.answer} for e in examples))
    return len(examples)


def _write_lines(out: str, rows: Iterable[Mapping[str, object]]) -> None:
    """One object a line; the file is there once it is complete. UserError for one that exists or is unwritable."""
    target = Path(out)
    if target.exists():
        raise UserError(f"{out}: exists already; choose another name or remove it.")
    partial = target.with_name(target.name + ".part")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); choose another place.") from error


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


@dataclass(frozen=True, slots=True, kw_only=True)
class PerturbedFile:
    """Rows written: perturbed demonstrations, untouched ones beside them, and those nothing could be changed in."""

    perturbed: int
    originals: int
    unchanged: int


def write_perturbed(
    task: Task,
    split: Split,
    out: str,
    limit: int | None = None,
    *,
    copies: int = 1,
    seed: int = 0,
    originals: bool = False,
    propagate_rate: float = 0.5,
) -> PerturbedFile:
    """Perturbed demonstrations as JSON Lines of traces, labelled with the step that holds the first changed character.

    copies: perturbations of each demonstration. originals: also write the demonstration itself, without a wrong step.
    The kind of change is the row's group. UserError for a split without demonstrations, and as `prepare`.
    """
    examples = [example for example in task.load(split, limit) if example.expert is not None]
    if not examples:
        raise UserError(
            f"data perturb: the {split} split of {task.name} holds no demonstration; choose another --split."
        )
    rng = random.Random(f"{seed}/perturb")
    counts = {"perturbed": 0, "originals": 0, "unchanged": 0}

    def rows() -> Iterator[dict[str, object]]:
        for example in examples:
            if originals:
                counts["originals"] += 1
                yield _trace_row(task, example, example.id, example.expert, None, "original")
            for copy in range(copies):
                change = task.perturb(example, example.expert, rng, propagate_rate=propagate_rate)
                if change is None:
                    counts["unchanged"] += 1
                    continue
                counts["perturbed"] += 1
                name = f"{example.id}/perturbed-{copy}"
                yield _trace_row(task, example, name, change.text, change.first_changed, change.kind)

    _write_lines(out, rows())
    return PerturbedFile(**counts)


def _trace_row(
    task: Task, example: Example, name: str, text: str, changed: int | None, group: str
) -> dict[str, object]:
    """changed: offset of the first wrong character, None for a trace without one."""
    ends = task.step_ends(text)
    return {
        "id": name,
        "prompt": example.prompt,
        "completion": text,
        "step_ends": ends,
        "answer": example.answer,
        "correct": task.verify(example, text),
        "first_wrong_step": None if changed is None else bisect_right(ends, changed),
        "group": group,
    }


def _indent(piece: str) -> str:
    return piece.rstrip("\n").replace("\n", "\n    | ")

"""What a task is, and the registry that makes one by name.

A task gives prompts with demonstrations and decides whether a completion is right, where its steps end and how it
can be broken. Training and evaluation know tasks only through `Task`.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

from airl_fast.data.perturb import KINDS, Perturbation, perturb
from airl_fast.data.propagate import propagate_numbers
from airl_fast.data.steps import step_ends
from airl_fast.data.tags import extract_answer, format_trace
from airl_fast.data.verify import answers_equal, canonical_answer
from airl_fast.errors import UserError
from airl_fast.types import Example

__all__ = ["LocatesErrors", "Split", "Task", "TextTask", "check_experts", "format_trace", "make_task", "task_names"]

Split = Literal["train", "dev", "test", "warmstart"]
SPLITS: tuple[str, ...] = get_args(Split)

# Told to models that must learn the layout from the prompt; the generated tasks need none.
SYSTEM_PROMPT = (
    "Think step by step inside <think> and </think>, then give only the final answer inside <answer> and </answer>."
)


@runtime_checkable
class Task(Protocol):
    """name: the registry's. system: the system message its prompts are rendered with, or None."""

    name: ClassVar[str]
    system: ClassVar[str | None]

    def load(self, split: Split, limit: int | None = None) -> list[Example]:
        """The split's examples, always in the same order; `limit` keeps the first ones.

        Prompts of different splits are disjoint. Raises UserError for an unknown or unavailable split.
        """

    def verify(self, example: Example, text: str) -> bool:
        """Is the answer of this completion right?"""

    def extract_answer(self, text: str) -> str | None:
        """The answer as written, or None."""

    def canonical_answer(self, example: Example, text: str) -> str | None:
        """One spelling for answers that mean the same, for majority vote; None when there is no answer."""

    def step_ends(self, text: str) -> list[int]:
        """Character offsets one past the end of each step; the last is len(text)."""

    def perturb(
        self,
        example: Example,
        text: str,
        rng: random.Random,
        kinds: Sequence[str] = KINDS,
        propagate_rate: float = 0.5,
    ) -> Perturbation | None:
        """A broken version of a trace of this example, or None when no kind applies."""


@runtime_checkable
class LocatesErrors(Protocol):
    """A task that knows the truth of every step."""

    def first_wrong_step(self, example: Example, text: str) -> int | None:
        """0-based index, into the pieces cut by `step_ends`, of the first wrong step; None when all are right."""


class TextTask:
    """Defaults for tasks with written answers: everything but `load`."""

    name: ClassVar[str]
    system: ClassVar[str | None] = SYSTEM_PROMPT

    def verify(self, example: Example, text: str) -> bool:
        return answers_equal(extract_answer(text), example.answer)

    def extract_answer(self, text: str) -> str | None:
        return extract_answer(text)

    def canonical_answer(self, example: Example, text: str) -> str | None:
        return canonical_answer(extract_answer(text))

    def step_ends(self, text: str) -> list[int]:
        return step_ends(text)

    def propagate(self, original: str, change: Perturbation) -> str | None:
        """The perturbed text with the error carried on to later steps, or None when there is nothing to carry."""
        return propagate_numbers(original, change)

    def wrong_options(self, example: Example) -> str:
        """Letters of the wrong options of a multiple-choice question; empty for other tasks."""
        return ""

    def perturb(
        self,
        example: Example,
        text: str,
        rng: random.Random,
        kinds: Sequence[str] = KINDS,
        propagate_rate: float = 0.5,
    ) -> Perturbation | None:
        """See `Task.perturb`. With probability `propagate_rate` the error is carried on to later steps.

        A draw that repairs a wrong trace instead (a right answer, or no wrong step left where the task knows) is
        thrown away: it would be a negative without an error.
        """
        options = self.wrong_options(example)
        for _ in range(8):
            propagate = self.propagate if rng.random() < propagate_rate else None
            change = perturb(text, rng, kinds, propagate=propagate, options=options)
            if change is None:
                return None
            answer_changed = extract_answer(change.text) != extract_answer(text)
            if answer_changed and self.verify(example, change.text):
                continue
            if isinstance(self, LocatesErrors) and self.first_wrong_step(example, change.text) is None:
                continue
            return change
        return None


_TASKS = {
    "arithmetic": "airl_fast.data.arithmetic:Arithmetic",
    "countdown": "airl_fast.data.countdown:Countdown",
    "gsm8k": "airl_fast.data.gsm8k:Gsm8k",
    "mmlu_pro": "airl_fast.data.mmlu_pro:MmluPro",
    "medreason": "airl_fast.data.medreason:MedReason",
    "jsonl": "airl_fast.data.jsonl:Jsonl",
}


def task_names() -> tuple[str, ...]:
    """Names that `make_task` knows."""
    return tuple(_TASKS)


def make_task(name: str, *, path: str | None = None, seed: int | None = None, **options: object) -> Task:
    """The task called `name`, a frozen dataclass built from its options (its fields; defaults apply).

    path: where a task that reads files finds them. seed: of a task that generates; others have fixed splits and
    ignore it. Raises UserError for an unknown task, an unknown option, an option out of range, or a path that is
    missing or not wanted.
    """
    if name not in _TASKS:
        raise UserError(f"unknown task {name!r}: {_suggest(name, _TASKS)}")
    module, _, attribute = _TASKS[name].partition(":")
    factory = getattr(import_module(module), attribute)
    known = [field.name for field in fields(factory)]
    for option, value in options.items():
        if option not in known:
            raise UserError(f"task {name!r} has no option {option!r}: {_suggest(option, known)}")
        _check_type(name, option, value, next(field.default for field in fields(factory) if field.name == option))
    if "path" in known:
        options["path"] = path
    elif path is not None:
        raise UserError(f"task {name!r} generates its prompts and reads no file: remove data.path.")
    if "seed" in known and seed is not None:
        options["seed"] = seed
    return factory(**options)


def check_split(task: str, split: str) -> None:
    """Raise UserError unless `split` is one of `SPLITS`."""
    if split not in SPLITS:
        raise UserError(f"task {task!r} has no split {split!r}: {_suggest(split, SPLITS)}")


def _check_type(task: str, option: str, value: object, default: object) -> None:
    """Raise UserError unless the value has the default's type (any number where the default is None)."""
    kinds = {bool: bool, int: int, float: (int, float), str: str, type(None): (int, float, type(None))}[type(default)]
    if not isinstance(value, kinds) or (isinstance(value, bool) and not isinstance(default, bool)):
        wanted = "number" if default is None or isinstance(default, float) else type(default).__name__
        raise UserError(f"task {task!r}: option {option!r} must be a {wanted}, not {value!r}.")


def _suggest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}."


@dataclass(frozen=True, slots=True)
class ExpertReport:
    """How many demonstrations the task's own verifier accepts.

    kept: the examples to use. failed: ids of examples whose demonstration fails.
    """

    kept: tuple[Example, ...]
    passed: int
    failed: tuple[str, ...]
    without_expert: int

    def __str__(self) -> str:
        text = f"{self.passed} of {self.passed + len(self.failed)} demonstrations pass their own verifier"
        if self.failed:
            shown = ", ".join(self.failed[:5]) + (", …" if len(self.failed) > 5 else "")
            text += f"; {len(self.failed)} fail ({shown})"
        return text + (f"; {self.without_expert} prompts have no demonstration" if self.without_expert else "")


def check_experts(
    task: Task, examples: Sequence[Example], policy: Literal["keep", "drop", "error"] = "keep"
) -> ExpertReport:
    """Verify every demonstration; the examples to use are the report's `kept`.

    policy: `keep` keeps all, `drop` leaves failing ones out, `error` raises UserError when one fails. Examples
    without a demonstration are always kept.
    """
    if policy not in ("keep", "drop", "error"):
        raise UserError(f"unknown policy {policy!r} for failing demonstrations: use keep, drop or error.")
    with_expert = [example for example in examples if example.expert is not None]
    wrong = [not task.verify(example, example.expert) for example in with_expert]
    failed = tuple(example.id for example, is_wrong in zip(with_expert, wrong, strict=True) if is_wrong)
    if failed and policy == "error":
        raise UserError(
            f"task {task.name!r}: {len(failed)} of {len(with_expert)} demonstrations fail their own verifier "
            f"(first: {failed[0]}); correct them or drop failing ones."
        )
    dropped = set(failed) if policy == "drop" else set()
    return ExpertReport(
        kept=tuple(example for example in examples if example.id not in dropped),
        passed=len(with_expert) - len(failed),
        failed=failed,
        without_expert=len(examples) - len(with_expert),
    )

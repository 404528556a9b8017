"""Generated arithmetic: "start 7; gain 1; lose 3; gain 2; lose 5?", one line a step.

Small enough to learn from scratch on a CPU. The warm-start corpora plant either a systematic misconception or random
slips, so that there is something for the reward to find. About 30 characters suffice to write everything.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from airl_fast.data.perturb import Perturbation
from airl_fast.data.splits import split_of
from airl_fast.data.steps import split_steps
from airl_fast.data.tags import ANSWER_OPEN, TAGS, answer_span, extract_answer, format_trace
from airl_fast.data.task import Split, TextTask, check_split
from airl_fast.data.verify import answers_equal
from airl_fast.errors import UserError
from airl_fast.types import Example

# Every character of prompts and traces, tags left out (a vocabulary may hold each tag as one symbol).
CHARSET = "\n +-=;?0123456789aegilnorst"

SHARES = {"warmstart": 0.6, "train": 0.2, "dev": 0.1, "test": 0.1}
MAX_OPERAND, MAX_VALUE = 5, 9
DEFAULT_SLIP_RATE = {"misconception": 0.02, "noisy": 0.15, "clean": 0.0}

_OPERATION = re.compile(r"(gain|lose) (\d+)")
_LINE = re.compile(r"(-?\d+) ([+-]) (-?\d+) = (-?\d+)")

Mode = Literal["misconception", "noisy", "clean"]


@dataclass(frozen=True, kw_only=True)
class Arithmetic(TextTask):
    """4-5 operations with operands 1-5; correct running values stay within 0-9.

    seed: decides which prompts of a split are drawn, never which split a prompt is in. *_size: examples per split.
    min_ops, max_ops: operations per prompt. warmstart_mode: how the warm-start traces go wrong (see
    `student_trace`); student_rate: share of them written by the student; slip_rate: chance that a step slips, None
    for the mode's own. expert_error_rate: share of training demonstrations that hold one slip, for ablations.
    """

    name: ClassVar[str] = "arithmetic"
    system: ClassVar[str | None] = None

    seed: int = 0
    train_size: int = 500
    dev_size: int = 200
    test_size: int = 200
    warmstart_size: int = 30_000
    min_ops: int = 4
    max_ops: int = 5
    warmstart_mode: Mode = "misconception"
    student_rate: float = 0.65
    slip_rate: float | None = None
    expert_error_rate: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_ops <= self.max_ops <= 20:
            raise UserError("arithmetic: min_ops and max_ops must satisfy 1 <= min_ops <= max_ops <= 20.")
        for key in ("train_size", "dev_size", "test_size", "warmstart_size"):
            if getattr(self, key) < 0:
                raise UserError(f"arithmetic: {key} must be 0 or more, not {getattr(self, key)}.")
        for key in ("student_rate", "slip_rate", "expert_error_rate"):
            value = getattr(self, key)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"arithmetic: {key} must lie between 0 and 1, not {value}.")
        if self.warmstart_mode not in DEFAULT_SLIP_RATE:
            raise UserError(f"arithmetic: warmstart_mode must be one of {', '.join(DEFAULT_SLIP_RATE)}.")

    def load(self, split: Split, limit: int | None = None) -> list[Example]:
        """Distinct prompts with clean demonstrations; `warmstart` is `warm_start_corpus` (prompts may repeat)."""
        check_split(self.name, split)
        size = getattr(self, f"{split}_size")
        size = size if limit is None else min(limit, size)
        if split == "warmstart":
            return self.warm_start_corpus(size)
        examples: dict[str, Example] = {}
        for attempt, example in enumerate(self._draw(split)):
            examples.setdefault(example.prompt, example)
            if len(examples) >= size:
                break
            if attempt > 1000 + 100 * size:
                raise UserError(
                    f"arithmetic: only {len(examples)} distinct {split} prompts have {self.min_ops} to {self.max_ops} "
                    f"operations; lower {split}_size to that or raise max_ops."
                )
        drawn = list(examples.values())[:size]
        if split != "train" or not self.expert_error_rate:
            return drawn
        rng = random.Random(f"arithmetic expert errors {self.seed}")
        return [
            replace(example, expert=_one_slip_trace(example, rng)) if rng.random() < self.expert_error_rate else example
            for example in drawn
        ]

    def warm_start_corpus(self, n: int, mode: Mode | None = None, seed: int | None = None) -> list[Example]:
        """n traces over warm-start prompts, partly wrong. mode and seed default to the task's own."""
        mode = self.warmstart_mode if mode is None else mode
        seed = self.seed if seed is None else seed
        rng = random.Random(f"arithmetic student {seed} {mode}")
        corpus = []
        for index, example in zip(range(n), self._draw("warmstart", seed), strict=False):
            expert = student_trace(example, rng, mode, student_rate=self.student_rate, slip_rate=self.slip_rate)
            corpus.append(replace(example, id=f"{example.id}#{index}", expert=expert))
        return corpus

    def propagate(self, original: str, change: Perturbation) -> str | None:
        return propagate_lines(original, change)

    def first_wrong_step(self, example: Example, text: str) -> int | None:
        """See `LocatesErrors`. A step is right when its line has the true value, operation, operand and result.

        A missing or surplus line is wrong where it shows. The last step is wrong when it holds a wrong answer or,
        in a text that breaks off, none.
        """
        truth = _true_lines(example.prompt)
        steps = split_steps(text)
        lines = [_strip_tags(step) for step in steps if ANSWER_OPEN not in step]
        for index, line in enumerate(lines):
            if index >= len(truth) or line != truth[index]:
                return index
        answered = answer_span(text) is not None
        if len(lines) == len(truth) and answered and answers_equal(extract_answer(text), example.answer):
            return None
        return max(0, len(steps) - 1)

    def _draw(self, split: str, seed: int | None = None) -> Iterator[Example]:
        """Endless examples whose prompts fall in `split`."""
        rng = random.Random(f"arithmetic {split} {self.seed if seed is None else seed}")
        while True:
            prompt = _draw_prompt(rng, self.min_ops, self.max_ops)
            if split_of(prompt, SHARES) == split:
                yield make_example(prompt)


def make_example(prompt: str) -> Example:
    """The prompt with its true answer and a clean demonstration."""
    lines = _true_lines(prompt)
    answer = lines[-1].rpartition(" ")[2]
    return Example(
        id="arithmetic/" + re.sub(r"[^\d+-]", "", prompt.replace("gain", "+").replace("lose", "-")),
        prompt=prompt,
        answer=answer,
        expert=format_trace("\n".join(lines), answer),
    )


def student_trace(
    example: Example,
    rng: random.Random,
    mode: Mode = "misconception",
    *,
    student_rate: float = 0.65,
    slip_rate: float | None = None,
) -> str:
    """A partly wrong trace: operands are written right, results can be wrong, and errors carry on.

    `misconception`: with probability student_rate the writer is the student, who subtracts 3 when asked to lose 4
    or 5 and adds 4 when asked to gain 5. In all modes each step slips by 1 or 2 with probability slip_rate. Values
    that leave 0-9 are written as they come (two digits, or a minus sign): clamping would be one more error to learn.
    """
    slip_rate = DEFAULT_SLIP_RATE[mode] if slip_rate is None else slip_rate
    is_student = mode == "misconception" and rng.random() < student_rate
    start, operations = parse_prompt(example.prompt)
    value, lines = start, []
    for amount in operations:
        believed = {-4: -3, -5: -3, 5: 4}.get(amount, amount) if is_student else amount
        result = value + believed
        if rng.random() < slip_rate:
            result += rng.choice((-2, -1, 1, 2))
        lines.append(_line(value, amount, result))
        value = result
    return format_trace("\n".join(lines), str(value))


def propagate_lines(original: str, change: Perturbation) -> str | None:
    """Recompute every line after a changed one, and the answer, so that they follow from the error.

    An error that the original already held in a later line stays there by the same amount. None when the change is
    in the answer or changes no line's value.
    """
    before, after = list(_LINE.finditer(original)), list(_LINE.finditer(change.text))
    if len(before) != len(after):
        return None
    pieces, done, shift, old_result = [], 0, 0, None
    for old, new in zip(before, after, strict=True):
        left, sign, right, result = int(new[1]), new[2], int(new[3]), int(new[4])
        follows = old_result is not None and int(old[1]) == old_result
        if new.group() == old.group():
            left += shift if follows else 0
        if new[4] == old[4]:
            result += (left - int(old[1])) + _signed(sign, right) - _signed(old[2], int(old[3]))
        pieces += [change.text[done : new.start()], _line(left, _signed(sign, right), result)]
        done, old_result, shift = new.end(), int(old[4]), result - int(old[4])
    text = "".join(pieces) + change.text[done:]
    span = answer_span(text)
    if span is not None and text[slice(*span)].strip() == str(old_result):
        text = text[: span[0]] + str(old_result + shift) + text[span[1] :]
    return None if text == change.text else text


def parse_prompt(prompt: str) -> tuple[int, list[int]]:
    """Start value and signed amounts of a prompt."""
    start = int(re.match(r"start (\d+)", prompt)[1])
    return start, [int(amount) if word == "gain" else -int(amount) for word, amount in _OPERATION.findall(prompt)]


def _draw_prompt(rng: random.Random, min_ops: int, max_ops: int) -> str:
    value = rng.randint(0, MAX_VALUE)
    words = [f"start {value}"]
    for _ in range(rng.randint(min_ops, max_ops)):
        amounts = [a for a in range(-MAX_OPERAND, MAX_OPERAND + 1) if a and 0 <= value + a <= MAX_VALUE]
        amount = rng.choice(amounts)
        words.append(f"{'gain' if amount > 0 else 'lose'} {abs(amount)}")
        value += amount
    return "; ".join(words) + "?"


def _true_lines(prompt: str) -> list[str]:
    value, operations = parse_prompt(prompt)
    lines = []
    for amount in operations:
        lines.append(_line(value, amount, value + amount))
        value += amount
    return lines


def _one_slip_trace(example: Example, rng: random.Random) -> str:
    value, operations = parse_prompt(example.prompt)
    wrong, lines = rng.randrange(len(operations)), []
    for index, amount in enumerate(operations):
        result = value + amount + (rng.choice((-2, -1, 1, 2)) if index == wrong else 0)
        lines.append(_line(value, amount, result))
        value = result
    return format_trace("\n".join(lines), str(value))


def _line(value: int, amount: int, result: int) -> str:
    return f"{value} {'+' if amount >= 0 else '-'} {abs(amount)} = {result}"


def _signed(sign: str, amount: int) -> int:
    return amount if sign == "+" else -amount


def _strip_tags(step: str) -> str:
    for tag in TAGS:
        step = step.replace(tag, "")
    return step.strip()

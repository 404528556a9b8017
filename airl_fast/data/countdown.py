"""Countdown: reach a target from given numbers. Generated with one worked solution, verified by safe arithmetic.

The answer is an expression, so many answers are right and no string comparison can tell.
"""

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from airl_fast.data.splits import split_of
from airl_fast.data.tags import extract_answer, format_trace
from airl_fast.data.task import Split, TextTask, check_split
from airl_fast.data.verify import canonical_answer, format_number, safe_arithmetic
from airl_fast.errors import UserError
from airl_fast.types import Example

SHARES = {"warmstart": 0.4, "train": 0.4, "dev": 0.1, "test": 0.1}

_PROMPT = re.compile(r"Make (\d+) from the numbers ([\d, ]+)\.")


@dataclass(frozen=True, kw_only=True)
class Countdown(TextTask):
    """min_numbers to max_numbers numbers from 1 to max_number; targets from 1 to max_target.

    seed: decides which puzzles of a split are drawn. The split follows from the sorted numbers and the target, so a
    puzzle and its reorderings are in one split. *_size: examples per split.
    """

    name: ClassVar[str] = "countdown"

    seed: int = 0
    train_size: int = 500
    dev_size: int = 200
    test_size: int = 200
    warmstart_size: int = 2000
    min_numbers: int = 3
    max_numbers: int = 4
    max_number: int = 20
    max_target: int = 100

    def __post_init__(self) -> None:
        if not 2 <= self.min_numbers <= self.max_numbers <= 6:
            raise UserError("countdown: min_numbers and max_numbers must satisfy 2 <= min_numbers <= max_numbers <= 6.")
        for key in ("max_number", "max_target"):
            if not 3 <= getattr(self, key) <= 1000:
                raise UserError(f"countdown: {key} must lie between 3 and 1000, not {getattr(self, key)}.")
        for key in ("train_size", "dev_size", "test_size", "warmstart_size"):
            if getattr(self, key) < 0:
                raise UserError(f"countdown: {key} must be 0 or more, not {getattr(self, key)}.")

    def load(self, split: Split, limit: int | None = None) -> list[Example]:
        """Distinct puzzles, each with a solution of its target that uses all numbers."""
        check_split(self.name, split)
        size = getattr(self, f"{split}_size")
        size = size if limit is None else min(limit, size)
        puzzles: dict[str, Example] = {}
        for attempt, (key, example) in enumerate(self._draw(split)):
            if len(puzzles) >= size:
                break
            puzzles.setdefault(key, example)
            if attempt > 1000 + 100 * size:
                raise UserError(
                    f"countdown: only {len(puzzles)} distinct {split} puzzles were found; "
                    f"lower {split}_size to that or raise max_number or max_numbers."
                )
        return list(puzzles.values())

    def verify(self, example: Example, text: str) -> bool:
        """Right when the expression reaches the target and uses each given number at most once."""
        answer = extract_answer(text)
        expression = None if answer is None else safe_arithmetic(answer)
        if expression is None:
            return False
        target, numbers = parse_puzzle(example.prompt)
        return expression.value == target and not Counter(expression.numbers) - Counter(numbers)

    def canonical_answer(self, example: Example, text: str) -> str | None:
        """Legal expressions count by their value, so that majority vote can agree on one."""
        answer = extract_answer(text)
        expression = None if answer is None else safe_arithmetic(answer)
        if expression is None or Counter(expression.numbers) - Counter(parse_puzzle(example.prompt)[1]):
            return canonical_answer(answer)
        return format_number(expression.value) or str(expression.value)

    def _draw(self, split: str) -> Iterator[tuple[str, Example]]:
        """Endless (key, example) whose keys fall in `split`."""
        rng = random.Random(f"countdown {split} {self.seed}")
        while True:
            numbers = [rng.randint(1, self.max_number) for _ in range(rng.randint(self.min_numbers, self.max_numbers))]
            lines, expression, target = _combine(numbers, rng)
            if not 1 <= target <= self.max_target or target in numbers:
                continue
            key = f"{target} from {sorted(numbers)}"
            if split_of(key, SHARES) != split:
                continue
            prompt = (
                f"Make {target} from the numbers {', '.join(map(str, numbers))}. "
                "Use each number at most once, with + - * / and parentheses."
            )
            identifier = f"countdown/{target}/{'-'.join(map(str, numbers))}"
            expert = format_trace("\n".join(lines), expression)
            yield key, Example(id=identifier, prompt=prompt, answer=str(target), expert=expert)


def parse_puzzle(prompt: str) -> tuple[int, list[int]]:
    """Target and numbers of a prompt."""
    match = _PROMPT.match(prompt)
    return int(match[1]), [int(number) for number in match[2].split(",")]


def _combine(numbers: list[int], rng: random.Random) -> tuple[list[str], str, int]:
    """Join random pairs until one value is left: the steps, the expression without outer parentheses, the value.

    Differences stay positive and quotients whole, as in the game.
    """
    pool = [(number, str(number)) for number in numbers]
    lines = []
    while len(pool) > 1:
        (a, left), (b, right) = (pool.pop(rng.randrange(len(pool))) for _ in range(2))
        if a < b:
            (a, left), (b, right) = (b, right), (a, left)
        signs = ["+", "*"] + ["-"] * (a > b) + ["/"] * (a % b == 0 and b > 1)
        sign = rng.choice(signs)
        value = {"+": a + b, "*": a * b, "-": a - b, "/": a // b}[sign]
        lines.append(f"{a} {sign} {b} = {value}")
        pool.append((value, f"({left} {sign} {right})"))
    value, expression = pool[0]
    return lines, expression[1:-1], value

"""Problem sizes, by name. A name says everything: `linear:4096x896x151936` is N=4096 tokens, H=896, V=151936.

`linear:4096x896x151665of151936` is the head as the trainer takes it: the 151,665 rows that the tokenizer can write,
the first of a weight of 151,936 rows; a gradient of the weight has all of them. Ours are told how many count, as in
the trainer (`num_tokens`); whoever cannot be told is given a slice.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.errors import BadArgument

# What the numbers of a name mean, by family.
FAMILIES = {
    "linear": ("tokens", "hidden", "vocabulary"),  # vocabulary projections
    "head": ("tokens", "hidden", "vocabulary"),  # token head; the vocabulary is that of the action head
    "sequences": ("sequences", "length"),  # returns and losses over B sequences of T tokens
    "logits": ("tokens", "vocabulary"),  # log-probabilities from given logits
}
SEQUENCE_LENGTH = 512  # of the sequences that the tokens of a `linear` shape are cut into


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """family: a key of FAMILIES. sizes: one positive number per name there. padded: rows of the weight that the
    vocabulary is sliced out of, None where it is the whole; of a linear shape only."""

    family: str
    sizes: tuple[int, ...]
    padded: int | None = None

    @property
    def name(self) -> str:
        padded = "" if self.padded is None else f"of{self.padded}"
        return f"{self.family}:{'x'.join(map(str, self.sizes))}{padded}"

    def size(self, what: str) -> int:
        return self.sizes[FAMILIES[self.family].index(what)]

    @property
    def tokens(self) -> int:
        return self.sizes[0] * self.sizes[1] if self.family == "sequences" else self.sizes[0]

    @property
    def sequences(self) -> int:
        """How many sequences of equal length the tokens form. Given logits are those of one sequence."""
        if self.family == "sequences":
            return self.sizes[0]
        if self.family == "logits":
            return 1
        count = max(4, self.tokens // SEQUENCE_LENGTH)
        return count if self.tokens % count == 0 else 1

    def with_tokens(self, tokens: int) -> "Shape":
        """The same problem with fewer tokens; sequences keep their own number and length."""
        if self.family == "sequences" or self.tokens <= tokens:
            return self
        return replace(self, sizes=(tokens, *self.sizes[1:]))


def parse_shape(name: str) -> Shape:
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:of(\d+))?", name.strip())
    family, sizes = (match[1], tuple(int(n) for n in match[2].split("x"))) if match else ("", ())
    padded = int(match[3]) if match and match[3] else None
    wrong = padded is not None and (family != "linear" or padded < sizes[-1])
    if family not in FAMILIES or len(sizes) != len(FAMILIES[family]) or min(sizes) < 1 or wrong:
        forms = ", ".join(f"{known}:{'x'.join(parts)}" for known, parts in FAMILIES.items())
        raise BadArgument(
            f"--shapes {name}: give cpu, gpu, a JSON file with a list of names, or names of the form {forms}."
        )
    return Shape(family=family, sizes=sizes, padded=padded)


# Ordered by importance: under a time budget the last ones are left out first.
_GPU_HEADS = ("3584x152064", "896x151936", "4096x128256", "1536x151936")
LISTS: dict[str, tuple[str, ...]] = {
    "gpu": (
        *(f"linear:{tokens}x{head}" for tokens in (4096, 16384) for head in _GPU_HEADS),
        *(f"head:32768x{head}" for head in _GPU_HEADS),
        *("sequences:1024x8192", "sequences:272x300", "sequences:1x1048576"),
        *("logits:4096x151936", "logits:4096x128256", "logits:4096x152064"),
    ),
    "cpu": (
        *("linear:256x128x8192", "head:8192x896x8192"),
        *("sequences:272x300", "sequences:1x100000"),
        "logits:256x8192",
    ),
}


def load_shapes(text: str) -> list[Shape]:
    """The shapes of `--shapes`: a list's name, a JSON file with a list of names, or names divided by commas."""
    if text in LISTS:
        return [parse_shape(name) for name in LISTS[text]]
    if text.endswith(".json"):
        return [parse_shape(name) for name in _names_in(Path(text))]
    return [parse_shape(name) for name in text.split(",")]


def _names_in(path: Path) -> Sequence[str]:
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise BadArgument(f"--shapes {path}: cannot be read as JSON ({error}).") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadArgument(f'--shapes {path}: write a JSON list of names, such as ["linear:256x128x8192"].')
    return names

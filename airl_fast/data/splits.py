"""A prompt's split is a function of the prompt alone, so no seed, order or limit can put it in two splits."""

import hashlib
from collections.abc import Mapping, Sequence

from airl_fast.errors import UserError
from airl_fast.types import Example


def split_of(key: str, shares: Mapping[str, float]) -> str:
    """The split a key falls in, drawn by its hash. shares: split name -> share; they sum to 1, order matters."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    position = int.from_bytes(digest) / 2**64
    for split, share in shares.items():
        position -= share
        if position < 0:
            return split
    return next(reversed(shares))


def carve(
    examples: Sequence[Example], split: str, *, task: str, dev_fraction: float, warmstart_fraction: float
) -> list[Example]:
    """The part of a published training set that serves as `split`: train, dev or warmstart.

    Prompts that differ only in blanks fall into one split. Raises UserError for an empty warm-start or dev share.
    """
    shares = {"dev": dev_fraction, "warmstart": warmstart_fraction, "train": 1 - dev_fraction - warmstart_fraction}
    if shares[split] <= 0:
        raise UserError(
            f"task {task!r}: no share of the training file is set aside for {split!r}; "
            f"set data.options.{'dev' if split == 'dev' else 'warmstart'}_fraction."
        )
    return [example for example in examples if split_of(" ".join(example.prompt.split()), shares) == split]


def check_fractions(task: str, dev_fraction: float, warmstart_fraction: float) -> None:
    """Raise UserError unless both shares and what they leave for training make sense."""
    if min(dev_fraction, warmstart_fraction) < 0 or dev_fraction + warmstart_fraction >= 1:
        raise UserError(
            f"task {task!r}: dev_fraction and warmstart_fraction must be 0 or more and leave something for training "
            f"(sum below 1), not {dev_fraction} and {warmstart_fraction}."
        )

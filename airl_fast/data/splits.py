"""A prompt's split is a function of the prompt alone, so no seed, order or limit can put it in two splits."""

import hashlib
from collections.abc import Mapping


def split_of(key: str, shares: Mapping[str, float]) -> str:
    """The split a key falls in, drawn by its hash. shares: split name -> share; they sum to 1, order matters."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    position = int.from_bytes(digest) / 2**64
    for split, share in shares.items():
        position -= share
        if position < 0:
            return split
    return next(reversed(shares))

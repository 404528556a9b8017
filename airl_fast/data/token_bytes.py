"""The bytes behind each token, and from them the characters: exact for any token sequence, sampled ones included.

Offsets that a tokenizer reports belong to *its* segmentation of a text; a sampler may have chosen another. Bytes
need no second tokenisation. A blank that a decoder would drop at the start of a text is kept: a completion is never
the start. Byte-level BPE (Qwen, Llama 3, GPT-2), byte-fallback pieces (Llama 2, Mistral, Gemma) and
plain vocabularies (one piece, one string) are covered.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from transformers import PreTrainedTokenizerBase

from airl_fast.errors import UserError


@dataclass(frozen=True)
class TokenBytes:
    """Maps token ids to bytes. Make it with `TokenBytes.of`."""

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    piece_bytes: Callable[[str], bytes]
    _added: dict[int, bytes] = field(repr=False)
    _known: dict[int, bytes] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenBytes":
        """Choose by the decoder in the tokenizer's own description. Raises UserError for one that is not known."""
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"]
        steps = decoder["decoders"] if decoder and decoder["type"] == "Sequence" else [decoder] if decoder else []
        kinds = {step["type"] for step in steps}
        if "ByteLevel" in kinds:
            # Added tokens are spelt in plain text, not in the byte alphabet.
            added = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
            return cls(tokenizer, _byte_level, added)
        if "Metaspace" in kinds or "ByteFallback" in kinds:
            return cls(tokenizer, _metaspace, {})
        if kinds <= {"Fuse"} and kinds:
            return cls(tokenizer, str.encode, {})
        raise UserError(
            f"tokenizer {tokenizer.name_or_path!r} has a decoder ({', '.join(sorted(kinds)) or 'none'}) "
            "whose tokens do not join to text; use a byte-level, byte-fallback or plain (Fuse) one."
        )

    def decode(self, tokens: Sequence[int]) -> str:
        return self._join(tokens)[0].decode("utf-8", errors="replace")

    def spans(self, tokens: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """The text of the tokens and the (start, end) characters of each; partial characters count as whole."""
        joined, ends = self._join(tokens)
        text = joined.decode("utf-8", errors="replace")
        owner = _char_of_byte(joined, text)
        spans, start = [], 0
        for end in ends:
            first = owner[start]
            spans.append((first, first if end == start else owner[end - 1] + 1))
            start = end
        return text, spans

    def _join(self, tokens: Sequence[int]) -> tuple[bytes, list[int]]:
        """All bytes, and the offset one past the end of each token."""
        pieces = [self._bytes(token) for token in tokens]
        ends, total = [], 0
        for piece in pieces:
            total += len(piece)
            ends.append(total)
        return b"".join(pieces), ends

    def _bytes(self, token: int) -> bytes:
        if token not in self._known:
            added = self._added.get(token)
            # Rows beyond the vocabulary (embeddings padded to a round size) have no piece and spell nothing.
            piece = "" if added is not None else self.tokenizer.convert_ids_to_tokens(token) or ""
            self._known[token] = self.piece_bytes(piece) if added is None else added
        return self._known[token]


def _char_of_byte(joined: bytes, text: str) -> list[int]:
    """Index of the character that each byte belongs to, plus one entry for the end.

    Valid UTF-8 is counted by its lead bytes. With invalid bytes, each replacement character owns the bytes it
    replaced; these are found by decoding character by character.
    """
    owner: list[int] = []
    if "�" not in text:
        for index, character in enumerate(text):
            owner += [index] * len(character.encode())
        return [*owner, len(text)]
    position = 0
    for index, character in enumerate(text):
        width = len(character.encode())
        if character == "�" and joined[position : position + 3] != b"\xef\xbf\xbd":
            width = _replaced_width(joined[position:])
        owner += [index] * width
        position += width
    return [*owner, len(text)]


def _replaced_width(rest: bytes) -> int:
    """How many bytes at the start of `rest` one replacement character stands for."""
    try:
        rest[:4].decode()
    except UnicodeDecodeError as error:
        return max(1, error.end - error.start)
    return 1


def _byte_level(piece: str) -> bytes:
    table = _byte_of_character()
    return bytes(table[character] for character in piece)


def _metaspace(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's byte alphabet: printable Latin-1 stands for itself, other bytes for U+0100 onwards, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    return table | {chr(256 + offset): byte for offset, byte in enumerate(others)}

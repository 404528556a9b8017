"""Carry per-token rewards from one tokenizer's tokens to another's through character offsets."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class SpanMap:
    """A sparse matrix in coordinates: destination token dst[k] takes weight[k] of source token src[k].

    dst, src: int64 [K]. weight: float32 [K]; the weights of each destination token sum to 1.
    """

    dst: torch.Tensor
    src: torch.Tensor
    weight: torch.Tensor

    def to(self, device: torch.device | str) -> "SpanMap":
        return SpanMap(self.dst.to(device), self.src.to(device), self.weight.to(device))


def span_map(src: Sequence[Span], dst: Sequence[Span]) -> SpanMap:
    """Match two tokenisations of one text by the characters their tokens cover.

    src, dst: (start, end) of each token, in order, as `ChatFormat.token_char_spans` gives them. A destination token
    takes every source token it overlaps, weighted by shared characters. A token of no width (end-of-turn) takes the
    token of no width at the same place, in order; without one, and wherever nothing overlaps, it takes the nearest
    source token before it. Equal tokenisations give the identity. Raises ValueError when only src is empty.
    """
    if len(dst) and not len(src):
        raise ValueError("span_map: no source tokens to take rewards from")
    if list(src) == list(dst):
        indices = torch.arange(len(dst))
        return SpanMap(indices, indices, torch.ones(len(dst)))
    rows, columns, weights = [], [], []
    empty_seen: dict[Span, int] = {}
    first = 0
    for row, (start, end) in enumerate(dst):
        # Source tokens that end at or before this start cannot overlap this or any later destination token.
        while first < len(src) and src[first][1] <= start and src[first][0] < start:
            first += 1
        if start == end:
            matches = _zero_width(src, first, (start, end), empty_seen)
        else:
            matches = _overlaps(src, first, start, end)
        total = sum(shared for _, shared in matches)
        for column, shared in matches:
            rows.append(row)
            columns.append(column)
            weights.append(shared / total)
    index = torch.tensor([rows, columns], dtype=torch.int64)
    return SpanMap(index[0], index[1], torch.tensor(weights, dtype=torch.float32))


def concat_span_maps(maps: Sequence[SpanMap], src_lengths: Sequence[int], dst_lengths: Sequence[int]) -> SpanMap:
    """One map for packed sequences: sequence i's tokens follow those of the sequences before it on both sides."""
    if not len(maps) == len(src_lengths) == len(dst_lengths):
        raise ValueError("concat_span_maps: maps, src_lengths and dst_lengths must have one entry per sequence")
    dst, src, dst_offset, src_offset = [], [], 0, 0
    for one, src_length, dst_length in zip(maps, src_lengths, dst_lengths, strict=True):
        dst.append(one.dst + dst_offset)
        src.append(one.src + src_offset)
        dst_offset += dst_length
        src_offset += src_length
    nothing = torch.zeros(0, dtype=torch.int64)
    return SpanMap(
        torch.cat([nothing, *dst]), torch.cat([nothing, *src]), torch.cat([torch.zeros(0), *(m.weight for m in maps)])
    )


def map_rewards(rewards: torch.Tensor, mapping: SpanMap, num_dst: int) -> torch.Tensor:
    """float [M_src] -> float [num_dst]: the overlap-weighted mean of the source tokens under each destination token.

    A mean, not a share of the sum, because a reward is a log-odds: a word read as one token must not count less than
    the same word read as three. Discounting and sums over a trace therefore run over destination tokens.
    """
    # Summed in float64, so that the order of a token's parts does not show in the result.
    mapped = rewards.new_zeros(num_dst, dtype=torch.float64)
    mapped.index_add_(0, mapping.dst, rewards[mapping.src].double() * mapping.weight.double())
    return mapped.to(rewards.dtype)


def _overlaps(src: Sequence[Span], first: int, start: int, end: int) -> list[tuple[int, int]]:
    """(source index, shared characters) of all overlaps; the nearest token before when there is none."""
    found = []
    for column in range(first, len(src)):
        if src[column][0] >= end:
            break
        shared = min(end, src[column][1]) - max(start, src[column][0])
        if shared > 0:
            found.append((column, shared))
    return found or [(_nearest_before(src, start), 1)]


def _zero_width(src: Sequence[Span], first: int, at: Span, seen: dict[Span, int]) -> list[tuple[int, int]]:
    """The k-th empty source token at this place for the k-th empty destination token, else the nearest before."""
    here = []
    for column in range(max(0, first - 1), len(src)):
        if src[column][0] > at[0]:
            break
        if src[column] == at:
            here.append(column)
    order = seen.get(at, 0)
    seen[at] = order + 1
    return [(here[min(order, len(here) - 1)] if here else _nearest_before(src, at[0]), 1)]


def _nearest_before(src: Sequence[Span], position: int) -> int:
    """The last source token that ends at or before a position; the first token when there is none."""
    return max((column for column in range(len(src)) if src[column][1] <= position), default=0)

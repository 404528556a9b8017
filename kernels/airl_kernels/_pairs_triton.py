"""The pairwise loss between logits and slopes: a score per sequence, the pairs' loss, slopes back to the tokens.

[S] numbers throughout, so every expert simply looks at all pairs for the ones made from it, in order: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._math_triton import sigmoid, softplus


@triton.jit
def _score_kernel(logits, weights, cu_seqlens, score, mass, BLOCK: tl.constexpr):
    """A sequence's mean logit weighted by `weights`, and their sum."""
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    weight_total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(start, end, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        w = tl.load(weights + tokens, mask=tokens < end, other=0.0)
        total += w * tl.load(logits + tokens, mask=tokens < end, other=0.0)
        weight_total += w
    w = tl.sum(weight_total)
    tl.store(mass + sequence, w)
    tl.store(score + sequence, tl.sum(total) / tl.where(w > 0.0, w, 1.0))


@triton.jit
def _pair_terms(score, mass, pairs, sequences, num_sequences, margin):
    """(counts, expert, shortfall) of the pairs whose perturbed side is in `sequences`."""
    ok = sequences < num_sequences
    expert = tl.load(pairs + sequences, mask=ok, other=-1)
    paired = expert >= 0
    counts = paired & (tl.load(mass + sequences, mask=ok, other=0.0) > 0.0)
    counts = counts & (tl.load(mass + expert, mask=paired, other=0.0) > 0.0)
    gap = tl.load(score + expert, mask=paired, other=0.0) - tl.load(score + sequences, mask=ok, other=0.0)
    return counts, expert, margin - gap


@triton.jit
def _pair_kernel(score, mass, pairs, partial_loss, score_slope, num_sequences, margin, BLOCK: tl.constexpr):
    """d loss / d score of BLOCK sequences: each looks at its own pair and, as an expert, at every pair made from it."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pulls = tl.zeros([BLOCK], dtype=tl.float32)
    total = 0
    for first in range(0, num_sequences, BLOCK):
        others = first + tl.arange(0, BLOCK)
        counts, expert, shortfall = _pair_terms(score, mass, pairs, others, num_sequences, margin)
        total += tl.sum(counts.to(tl.int32))
        pull = tl.where(counts, sigmoid(shortfall), 0.0)
        pulls -= tl.sum(tl.where(expert[None, :] == mine[:, None], pull[None, :], 0.0), axis=1)
    counts, _, shortfall = _pair_terms(score, mass, pairs, mine, num_sequences, margin)
    pulls += tl.where(counts, sigmoid(shortfall), 0.0)
    share = 1.0 / tl.maximum(total, 1).to(tl.float32)
    weight = tl.load(mass + mine, mask=mine < num_sequences, other=0.0)
    tl.store(score_slope + mine, pulls * share / tl.where(weight > 0.0, weight, 1.0), mask=mine < num_sequences)
    tl.store(partial_loss + tl.program_id(0), tl.sum(tl.where(counts, softplus(shortfall) * share, 0.0)))


@triton.jit
def _spread_kernel(score_slope, weights, cu_seqlens, slopes, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    end = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    slope = tl.load(score_slope + sequence)
    for first in range(start, end, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        w = tl.load(weights + tokens, mask=tokens < end, other=0.0)
        tl.store(slopes + tokens, slope * w, mask=tokens < end)


def pairwise(
    logits: Tensor, weights: Tensor, cu_seqlens: Tensor, pairs: Tensor, margin: float
) -> tuple[Tensor, Tensor]:
    """(loss, slopes [N]) from the logits; see `token_head.pairwise_of`."""
    sequences = pairs.numel()
    slopes = torch.zeros_like(logits)
    if not sequences:
        return logits.new_zeros(()), slopes
    score, mass, score_slope = torch.empty((3, sequences), dtype=torch.float32, device=logits.device).unbind(0)
    blocks = triton.cdiv(sequences, 64)
    partial_loss = torch.empty(blocks, dtype=torch.float32, device=logits.device)
    _score_kernel[(sequences,)](logits, weights, cu_seqlens, score, mass, BLOCK=512, num_warps=4)
    _pair_kernel[(blocks,)](score, mass, pairs, partial_loss, score_slope, sequences, margin, BLOCK=64, num_warps=4)
    _spread_kernel[(sequences,)](score_slope, weights, cu_seqlens, slopes, BLOCK=512, num_warps=4)
    return partial_loss.sum(), slopes

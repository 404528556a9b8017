"""Triton kernels of the policy losses: per token, on [M] numbers. The mathematics is in `policy_loss.py`.

- `_terms_kernel`     everything a token contributes, one read of its inputs and one write of its terms and slope;
- `_sequence_kernel`  one program per sequence: its mean log-ratio, given back to its tokens, in a fixed order.

Beside the logits these are small; they exist so that a step has few launches and no intermediate tensors.
"""

import sys
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .linear_policy_loss import linear_loss_forward
from .logprob import LogitMap
from .logprob_triton import logit_gradient_, row_stats, scale_rows
from .policy_loss import NUM_TERMS, Clip, TokenInputs, loss_forward

__all__ = ["logit_gradient_", "row_stats", "scale_rows", "sequence_log_ratio", "surrogate_terms"]


# ---- device functions ------------------------------------------------------------------------------------------


@triton.jit
def _k3(d):
    """exp(d) - 1 - d, by its series where the difference would cancel."""
    # Σ d^n / (n+2)!, exact to fp32 for |d| < 1
    series = 1.6059044e-10 * d + 2.0876757e-9
    series = series * d + 2.5052108e-8
    series = series * d + 2.7557319e-7
    series = series * d + 2.7557319e-6
    series = series * d + 2.4801587e-5
    series = series * d + 1.9841270e-4
    series = series * d + 1.3888889e-3
    series = series * d + 8.3333333e-3
    series = series * d + 4.1666667e-2
    series = series * d + 1.6666667e-1
    series = series * d + 0.5
    return tl.where(tl.abs(d) < 1.0, d * d * series, tl.exp(d) - 1.0 - d)


@triton.jit
def _clipped(log_ratio, advantage, low_bound, high_bound, dual_bound, DUAL: tl.constexpr):
    """(loss, slope, clipped low, clipped high, dual clipped), as `policy_variants.clipped`."""
    ratio = tl.exp(log_ratio)
    high = (advantage > 0.0) & (ratio > high_bound)
    low = (advantage < 0.0) & (ratio < low_bound)
    kept = tl.where(high, high_bound, tl.where(low, low_bound, ratio))
    dual = high & low  # never
    if DUAL:
        dual = (advantage < 0.0) & (ratio > dual_bound)
        kept = tl.where(dual, dual_bound, kept)
    loss = tl.where(advantage == 0.0, 0.0, -advantage * kept)
    return loss, tl.where(high | low | dual, 0.0, loss), low, high, dual


@triton.jit
def _truncated(logprob, log_ratio, advantage, low_bound, high_bound):
    """The same five, as `policy_variants.truncated`."""
    ratio = tl.exp(log_ratio)
    low, high = ratio < low_bound, ratio > high_bound
    slope = -advantage * tl.where(low, low_bound, tl.where(high, high_bound, ratio))
    return tl.where(advantage == 0.0, 0.0, slope * logprob), slope, low, high, low & high


# ---- kernels ---------------------------------------------------------------------------------------------------


@triton.jit
def _terms_kernel(
    logprobs, old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio, sequence_ratio, terms, slopes,
    num_rows, terms_stride, low_bound, high_bound, dual_bound, beta,
    CISPO: tl.constexpr, DUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    live = inside
    if mask is not None:
        live = tl.load(mask + rows, mask=inside, other=0) != 0
    logprob = tl.load(logprobs + rows, mask=live, other=0.0)
    log_ratio = logprob - tl.load(old_logprobs + rows, mask=live, other=0.0)
    advantage = tl.load(advantages + rows, mask=live, other=0.0)
    clipping = log_ratio
    if sequence_ratio is not None:
        clipping = tl.load(sequence_ratio + rows, mask=live, other=0.0)
    if CISPO:
        loss, slope, low, high, dual = _truncated(logprob, clipping, advantage, low_bound, high_bound)
    else:
        loss, slope, low, high, dual = _clipped(clipping, advantage, low_bound, high_bound, dual_bound, DUAL)
    if is_ratio is not None:
        ratio = tl.load(is_ratio + rows, mask=live, other=0.0)
        loss *= ratio
        slope *= ratio
    terms += rows  # rows of `terms`: OBJECTIVE, SURROGATE, LOG_RATIO, APPROX_KL, REFERENCE_KL, CLIP_LOW, ...
    tl.store(terms + terms_stride, loss, mask=inside)
    tl.store(terms + 2 * terms_stride, log_ratio, mask=inside)
    tl.store(terms + 3 * terms_stride, _k3(log_ratio), mask=inside)
    reference = log_ratio * 0.0
    if ref_logprobs is not None:
        distance = tl.load(ref_logprobs + rows, mask=live, other=0.0) - logprob
        reference = _k3(distance)
        loss += beta * reference
        slope -= beta * (reference + distance)
    tl.store(terms + 4 * terms_stride, reference, mask=inside)
    tl.store(terms + 5 * terms_stride, tl.where(low, 1.0, 0.0), mask=inside)
    tl.store(terms + 6 * terms_stride, tl.where(high, 1.0, 0.0), mask=inside)
    tl.store(terms + 7 * terms_stride, tl.where(dual, 1.0, 0.0), mask=inside)
    if weights is not None:
        weight = tl.load(weights + rows, mask=live, other=0.0)
        loss *= weight
        slope *= weight
    tl.store(terms, loss, mask=inside)
    tl.store(slopes + rows, slope, mask=inside)


@triton.jit
def _sequence_kernel(logprobs, old_logprobs, mask, cu_seqlens, means, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    first = tl.load(cu_seqlens + sequence).to(tl.int64)
    last = tl.load(cu_seqlens + sequence + 1).to(tl.int64)
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    counts = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        live = rows < last
        if mask is not None:
            live = live & (tl.load(mask + rows, mask=live, other=0) != 0)
        new, old = tl.load(logprobs + rows, mask=live, other=0.0), tl.load(old_logprobs + rows, mask=live, other=0.0)
        sums += new - old
        counts += tl.where(live, 1.0, 0.0)
    mean = tl.sum(sums, axis=0) / tl.maximum(tl.sum(counts, axis=0), 1.0)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        tl.store(means + rows, tl.zeros([BLOCK], dtype=tl.float32) + mean, mask=rows < last)


# ---- launchers -------------------------------------------------------------------------------------------------


def surrogate_terms(
    logprobs: Tensor, inputs: TokenInputs, sequence_ratio: Tensor | None, clip: Clip, terms: Tensor, slope: Tensor
) -> None:
    """As `policy_loss.surrogate_terms`."""
    num_rows = logprobs.shape[0]
    if num_rows:
        _terms_kernel[(triton.cdiv(num_rows, 512),)](
            logprobs, *inputs.columns(), sequence_ratio, terms, slope, num_rows, terms.stride(0),
            1.0 - clip.low, 1.0 + clip.high, clip.dual, clip.beta,
            CISPO=clip.surrogate == "cispo", DUAL=clip.dual != 0.0, BLOCK=512, num_warps=4,
        )  # fmt: skip


def sequence_log_ratio(logprobs: Tensor, inputs: TokenInputs, cu_seqlens: Tensor) -> Tensor:
    """As `policy_loss.sequence_log_ratio`."""
    means = torch.empty_like(logprobs)
    sequences = cu_seqlens.shape[0] - 1
    if sequences:
        _sequence_kernel[(sequences,)](
            logprobs, inputs.old_logprobs, inputs.mask, cu_seqlens, means, BLOCK=1024, num_warps=4
        )
    return means


# ---- ops: the loops of the contract files around these kernels -------------------------------------------------


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor | None, weights: Tensor | None,
    ref_logprobs: Tensor | None, is_ratio: Tensor | None, cu_seqlens: Tensor | None, surrogate: str,
    clip: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = TokenInputs(old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio)
    return loss_forward(_KERNELS, logprobs.contiguous(), inputs, cu_seqlens, Clip(surrogate, *clip))


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, old_logprobs: Tensor, advantages: Tensor,
    mask: Tensor | None, weights: Tensor | None, ref_logprobs: Tensor | None, is_ratio: Tensor | None,
    cu_seqlens: Tensor | None, surrogate: str, clip: Sequence[float], mapping: Sequence[float],
    entropy: bool, compact: bool, chunk_rows: int, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = TokenInputs(old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio)
    settings = Clip(surrogate, *clip), LogitMap(*mapping), entropy, compact, chunk_rows, needs
    return linear_loss_forward(_KERNELS, hidden, weight, targets.contiguous(), bias, inputs, cu_seqlens, *settings)


_KERNELS = sys.modules[__name__]


def shipped_launches() -> dict[str, Callable[[], object]]:
    """The launches that `cross_compile` compiles for every chip."""
    rows, sequences = 16384, 64
    numbers = torch.empty(rows, device="meta")
    mask = torch.empty(rows, dtype=torch.bool, device="meta")
    cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    terms = torch.empty((NUM_TERMS, rows), device="meta")
    plain = TokenInputs(numbers, numbers, None, None, None, None)
    full = TokenInputs(numbers, numbers, mask, numbers, numbers, numbers)
    launches = {}
    for name, inputs, sequence in (("", plain, None), (" every input", full, numbers)):
        for clip in (
            Clip("clip", 0.2, 0.28, 0.0, 0.1),
            Clip("clip", 0.2, 0.2, 3.0, 0.1),
            Clip("cispo", 1.0, 4.0, 0.0, 0.1),
        ):
            kind = f"{clip.surrogate}{' dual' if clip.dual else ''}{name}"
            launches[f"surrogate_terms {kind}"] = lambda i=inputs, s=sequence, c=clip: surrogate_terms(
                numbers, i, s, c, terms, numbers
            )
        launches[f"sequence_log_ratio{name}"] = lambda i=inputs: sequence_log_ratio(numbers, i, cu_seqlens)
    return launches

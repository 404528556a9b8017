"""Triton kernels of the policy losses: per token, on [M] numbers. The mathematics is in `policy_loss.py`.

- `_terms_kernel`     everything a token contributes, one read of its inputs and one write of its terms and slope;
- `_sequence_kernel`  one program per sequence: its mean log-ratio, or its log importance weight, given back to its
                      tokens, in a fixed order;
- `_totals_kernel`    one program per row of terms: its sum and its mean, in a fixed order.

Beside the logits these are small; they exist so that a step has few launches and no intermediate tensors.
"""

import sys
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._chunking import make_head
from ._policy_terms import NUM_TERMS, Clip, TokenInputs
from .linear_policy_loss import linear_loss_forward
from .logprob import LogitMap
from .logprob_triton import logit_gradient_, row_stats, scale_rows
from .policy_loss import loss_forward

__all__ = [
    "logit_gradient_",
    "row_stats",
    "scale_rows",
    "sequence_log_ratio",
    "sequence_log_weight",
    "surrogate_terms",
    "totals",
]


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
def _log_ratio(new, base):
    """new - base, 0 where base is absent (NaN), as `_policy_terms.log_ratio_of`."""
    return tl.where(base == base, new - base, tl.where(new == new, 0.0, new))


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
    logprobs, entropies, old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio, sampler_logprobs,
    sequence_ratio, sequence_weight, terms, slopes,
    num_rows, terms_stride, low_bound, high_bound, dual_bound, beta, ceiling,
    CISPO: tl.constexpr, DUAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    live = inside
    if mask is not None:
        live = tl.load(mask + rows, mask=inside, other=0) != 0
    logprob = tl.load(logprobs + rows, mask=live, other=0.0)
    old = logprob
    log_ratio = tl.where(logprob == logprob, 0.0, logprob)
    if old_logprobs is not None:
        old = tl.load(old_logprobs + rows, mask=live, other=0.0)
        log_ratio = _log_ratio(logprob, old)
        old = tl.where(old == old, old, logprob)
    advantage = tl.load(advantages + rows, mask=live, other=0.0)
    clipping = log_ratio
    if sequence_ratio is not None:
        clipping = tl.load(sequence_ratio + rows, mask=live, other=0.0)
    if CISPO:
        loss, slope, low, high, dual = _truncated(logprob, clipping, advantage, low_bound, high_bound)
    else:
        loss, slope, low, high, dual = _clipped(clipping, advantage, low_bound, high_bound, dual_bound, DUAL)
    ratio = tl.where(live, 1.0, 0.0)
    if is_ratio is not None:
        ratio = tl.load(is_ratio + rows, mask=live, other=0.0)
    if sampler_logprobs is not None:
        if sequence_weight is not None:
            log_weight = tl.load(sequence_weight + rows, mask=live, other=0.0)
        else:
            log_weight = _log_ratio(old, tl.load(sampler_logprobs + rows, mask=live, other=0.0))
        ratio = tl.exp(log_weight)
        ratio = tl.where(live, tl.where(ratio > ceiling, ceiling, ratio), 0.0)  # a NaN stays
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
    tl.store(terms + 8 * terms_stride, tl.where(low | high | dual, 1.0, 0.0), mask=inside)
    tl.store(terms + 9 * terms_stride, ratio, mask=inside)
    tl.store(terms + 10 * terms_stride, logprob, mask=inside)
    entropy = tl.zeros([BLOCK], dtype=tl.float32)
    if entropies is not None:
        entropy = tl.load(entropies + rows, mask=live, other=0.0)
    tl.store(terms + 11 * terms_stride, entropy, mask=inside)
    if weights is not None:
        weight = tl.load(weights + rows, mask=live, other=0.0)
        loss *= weight
        slope *= weight
    tl.store(terms, loss, mask=inside)
    tl.store(slopes + rows, slope, mask=inside)


@triton.jit
def _sequence_kernel(logprobs, old_logprobs, sampler_logprobs, mask, cu_seqlens, result, BLOCK: tl.constexpr):
    """The mean of log π - log π_old; with a sampler, the sum of log π_old - log π_sampler."""
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
        new = tl.load(logprobs + rows, mask=live, other=0.0)
        base = new
        if old_logprobs is not None:
            base = tl.load(old_logprobs + rows, mask=live, other=0.0)
        if sampler_logprobs is not None:
            new = tl.where(base == base, base, new)
            base = tl.load(sampler_logprobs + rows, mask=live, other=0.0)
        sums += _log_ratio(new, base)
        counts += tl.where(live, 1.0, 0.0)
    total = tl.sum(sums, axis=0)
    if sampler_logprobs is None:
        total = total / tl.maximum(tl.sum(counts, axis=0), 1.0)
    for start in range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        tl.store(result + rows, tl.zeros([BLOCK], dtype=tl.float32) + total, mask=rows < last)


@triton.jit
def _totals_kernel(
    terms, mask, total, means, num_rows, terms_stride, TERMS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    term = tl.program_id(0)
    row = terms + term.to(tl.int64) * terms_stride
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    counts = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, num_rows, BLOCK, num_stages=STAGES):
        rows = first + tl.arange(0, BLOCK)
        inside = rows < num_rows
        sums += tl.load(row + rows, mask=inside, other=0.0)
        if mask is not None:
            counts += tl.where(tl.load(mask + rows, mask=inside, other=0) != 0, 1.0, 0.0)
        else:
            counts += tl.where(inside, 1.0, 0.0)
    summed, count = tl.sum(sums, axis=0), tl.sum(counts, axis=0)
    tl.store(means + term, summed / tl.maximum(count, 1.0))
    if term == 0:
        tl.store(total, summed)
        tl.store(means + TERMS, count)


# ---- launchers -------------------------------------------------------------------------------------------------


def surrogate_terms(
    logprobs: Tensor, entropy: Tensor | None, inputs: TokenInputs, sequence_ratio: Tensor | None,
    sequence_weight: Tensor | None, clip: Clip, terms: Tensor, slope: Tensor,
) -> None:  # fmt: skip
    """As `_policy_terms.surrogate_terms`."""
    num_rows = logprobs.shape[0]
    if num_rows:
        _terms_kernel[(triton.cdiv(num_rows, 512),)](
            logprobs, entropy, *inputs.columns(), sequence_ratio, sequence_weight, terms, slope, num_rows,
            terms.stride(0), 1.0 - clip.low, 1.0 + clip.high, clip.dual, clip.beta, clip.ceiling,
            CISPO=clip.surrogate == "cispo", DUAL=clip.dual != 0.0, BLOCK=512, num_warps=4,
        )  # fmt: skip


def sequence_log_ratio(logprobs: Tensor, inputs: TokenInputs, cu_seqlens: Tensor) -> Tensor:
    """As `_policy_terms.sequence_log_ratio`."""
    return _sequence_sums(logprobs, inputs, None, cu_seqlens)


def sequence_log_weight(logprobs: Tensor, inputs: TokenInputs, cu_seqlens: Tensor) -> Tensor:
    """As `_policy_terms.sequence_log_weight`."""
    return _sequence_sums(logprobs, inputs, inputs.sampler_logprobs, cu_seqlens)


def _sequence_sums(logprobs: Tensor, inputs: TokenInputs, sampler: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    result = torch.empty_like(logprobs)
    sequences = cu_seqlens.shape[0] - 1
    if sequences:
        _sequence_kernel[(sequences,)](
            logprobs, inputs.old_logprobs, sampler, inputs.mask, cu_seqlens, result, BLOCK=1024, num_warps=4
        )
    return result


def totals(terms: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `_policy_terms.totals`."""
    total, means = terms.new_empty(()), terms.new_empty(NUM_TERMS + 1)
    _totals_kernel[(NUM_TERMS,)](
        terms, mask, total, means, terms.shape[1], terms.stride(0),
        TERMS=NUM_TERMS, BLOCK=2048, STAGES=3, num_warps=4,
    )  # fmt: skip
    return total, means


# ---- ops: the loops of the contract files around these kernels -------------------------------------------------


def ppo_loss(
    logprobs: Tensor, old_logprobs: Tensor | None, advantages: Tensor, mask: Tensor | None, weights: Tensor | None,
    ref_logprobs: Tensor | None, is_ratio: Tensor | None, sampler_logprobs: Tensor | None, cu_seqlens: Tensor | None,
    by_sequence: Sequence[bool], surrogate: str, clip: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = TokenInputs(old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio, sampler_logprobs)
    return loss_forward(_KERNELS, logprobs.contiguous(), inputs, cu_seqlens, by_sequence, Clip(surrogate, *clip))


def linear_ppo_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, old_logprobs: Tensor | None,
    advantages: Tensor, mask: Tensor | None, weights: Tensor | None, ref_logprobs: Tensor | None,
    is_ratio: Tensor | None, sampler_logprobs: Tensor | None, cu_seqlens: Tensor | None, by_sequence: Sequence[bool],
    surrogate: str, clip: Sequence[float], mapping: Sequence[float], entropy: bool, compact: bool, chunk_rows: int,
    num_tokens: int, fp32_logits: bool, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = TokenInputs(old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio, sampler_logprobs)
    return linear_loss_forward(
        _KERNELS, make_head(hidden, weight, bias, num_tokens, fp32_logits), weight.shape[0], targets.contiguous(),
        inputs, cu_seqlens, by_sequence, Clip(surrogate, *clip), LogitMap(*mapping), entropy, compact, chunk_rows,
        needs,
    )  # fmt: skip


_KERNELS = sys.modules[__name__]


def shipped_launches() -> dict[str, Callable[[], object]]:
    """The launches that `cross_compile` compiles for every chip."""
    rows, sequences = 16384, 64
    numbers = torch.empty(rows, device="meta")
    mask = torch.empty(rows, dtype=torch.bool, device="meta")
    cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
    terms = torch.empty((NUM_TERMS, rows), device="meta")
    cases = {
        "": (TokenInputs(numbers, numbers, None, None, None, None, None), None, None),
        " first pass": (TokenInputs(None, numbers, None, None, None, None, numbers), None, None),
        " every input": (TokenInputs(numbers, numbers, mask, numbers, numbers, numbers, None), numbers, None),
        " sampler": (TokenInputs(numbers, numbers, mask, numbers, numbers, None, numbers), None, numbers),
    }
    launches = {}
    for name, (inputs, ratio, weight) in cases.items():
        for clip in (
            Clip("clip", 0.2, 0.28, 0.0, 0.1, 2.0),
            Clip("clip", 0.2, 0.2, 3.0, 0.1, 2.0),
            Clip("cispo", 1.0, 4.0, 0.0, 0.1, 2.0),
        ):
            kind = f"{clip.surrogate}{' dual' if clip.dual else ''}{name}"
            launches[f"surrogate_terms {kind}"] = lambda i=inputs, r=ratio, w=weight, c=clip: surrogate_terms(
                numbers, numbers, i, r, w, c, terms, numbers
            )
        launches[f"totals{name}"] = lambda i=inputs: totals(terms, i.mask)
        if inputs.old_logprobs is not None and inputs.sampler_logprobs is None:
            launches[f"sequence_log_ratio{name}"] = lambda i=inputs: sequence_log_ratio(numbers, i, cu_seqlens)
        if inputs.sampler_logprobs is not None:
            launches[f"sequence_log_weight{name}"] = lambda i=inputs: sequence_log_weight(numbers, i, cu_seqlens)
    return launches

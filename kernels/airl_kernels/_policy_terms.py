"""The policy losses in plain torch: what every token contributes, its slope, and the totals.

What the ops of `policy_loss.py` and `linear_policy_loss.py` mean; `policy_loss_triton.py` has the same for CUDA.

A log-probability of the old policy or of the sampler may be absent: NaN for a token, None for all. An absent π_old is
the policy itself, held constant: the ratio is 1 and has its gradient. An absent sampler is π_old: the importance
weight is 1, or the ceiling if that is lower.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import segment_ids
from .logprob import Reference as LogprobReference
from .policy_variants import clipped, truncated

# Rows of `terms` [12, M], everything a step reports per token. Tokens without mask hold 0 everywhere.
(OBJECTIVE, SURROGATE, LOG_RATIO, APPROX_KL, REFERENCE_KL, CLIP_LOW, CLIP_HIGH, DUAL_CLIP, CLIPPED, IS_RATIO, LOGPROB,
 ENTROPY) = range(12)  # fmt: skip
NUM_TERMS = 12


@dataclass(frozen=True, slots=True)
class Clip:
    """Which surrogate, and its constants. dual 0 means none. ceiling: of importance weights from `sampler_logprobs`."""

    surrogate: str
    low: float
    high: float
    dual: float
    beta: float
    ceiling: float

    def constants(self) -> list[float]:
        return [self.low, self.high, self.dual, self.beta, self.ceiling]


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What the loss needs per token beside log π_t; all [M], float32 but for the bool mask; None where not given."""

    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor | None
    weights: Tensor | None
    ref_logprobs: Tensor | None
    is_ratio: Tensor | None
    sampler_logprobs: Tensor | None

    def part(self, rows: slice) -> "TokenInputs":
        return TokenInputs(*(None if t is None else t[rows] for t in self.columns()))

    def columns(self) -> tuple[Tensor | None, ...]:
        return (self.old_logprobs, self.advantages, self.mask, self.weights, self.ref_logprobs, self.is_ratio,
                self.sampler_logprobs)  # fmt: skip


# ---- ratios ------------------------------------------------------------------------------------------------------


def log_ratio_of(new: Tensor, base: Tensor | None) -> Tensor:
    """new - base [M], 0 where base is absent. A NaN in new stays."""
    same = torch.where(new.isnan(), new, 0.0)
    return same if base is None else torch.where(base.isnan(), same, new - base)


def old_policy(logprobs: Tensor, inputs: TokenInputs) -> Tensor:
    """log π_old [M], the policy's own where absent."""
    old = inputs.old_logprobs
    return logprobs if old is None else torch.where(old.isnan(), logprobs, old)


def _sequence_sums(values: Tensor, mask: Tensor | None, cu_seqlens: Tensor, mean: bool) -> Tensor:
    """Sum or mean of values over the counting tokens of a sequence, given back to each of its tokens. [M]"""
    ids = segment_ids(cu_seqlens, values.numel())
    zeros = values.new_zeros(cu_seqlens.numel() - 1)
    live = torch.ones_like(values)
    if mask is not None:
        values, live = torch.where(mask, values, 0.0), mask.to(values.dtype)
    sums = zeros.index_add(0, ids, values)
    return (sums / zeros.index_add(0, ids, live).clamp_(min=1.0) if mean else sums)[ids]


def sequence_log_ratio(logprobs: Tensor, inputs: TokenInputs, cu_seqlens: Tensor) -> Tensor:
    """Mean of log π - log π_old over the counting tokens of a sequence, given back to each of its tokens. [M]"""
    return _sequence_sums(log_ratio_of(logprobs, inputs.old_logprobs), inputs.mask, cu_seqlens, True)


def sequence_log_weight(logprobs: Tensor, inputs: TokenInputs, cu_seqlens: Tensor) -> Tensor:
    """Sum of log π_old - log π_sampler over the counting tokens of a sequence, given back likewise. [M]"""
    log_weight = log_ratio_of(old_policy(logprobs, inputs), inputs.sampler_logprobs)
    return _sequence_sums(log_weight, inputs.mask, cu_seqlens, False)


# ---- terms -------------------------------------------------------------------------------------------------------


def surrogate_terms(
    logprobs: Tensor,
    entropy: Tensor | None,
    inputs: TokenInputs,
    sequence_ratio: Tensor | None,
    sequence_weight: Tensor | None,
    clip: Clip,
    terms: Tensor,
    slope: Tensor,
) -> None:
    """Fill `terms` [12, M] and `slope` [M] = d objective_t / d log π_t."""
    mask = inputs.mask

    def live(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0.0)

    weight = inputs.is_ratio
    if inputs.sampler_logprobs is not None:
        log_weight = sequence_weight
        if log_weight is None:
            log_weight = log_ratio_of(old_policy(logprobs, inputs), inputs.sampler_logprobs)
        weight = log_weight.exp().clamp(max=clip.ceiling)
    log_ratio = live(log_ratio_of(logprobs, inputs.old_logprobs))
    logprobs, advantages = live(logprobs), live(inputs.advantages)
    clipping = log_ratio if sequence_ratio is None else live(sequence_ratio)
    if clip.surrogate == "clip":
        pick = clipped(clipping, advantages, clip.low, clip.high, clip.dual)
    else:
        pick = truncated(logprobs, clipping, advantages, clip.low, clip.high)
    loss, gradient = pick.loss, pick.slope
    if weight is None:
        terms[IS_RATIO] = 1.0 if mask is None else mask
    else:
        terms[IS_RATIO] = weight = live(weight)
        loss, gradient = loss * weight, gradient * weight
    terms[SURROGATE] = loss
    terms[LOG_RATIO] = log_ratio
    terms[APPROX_KL] = log_ratio.expm1().sub_(log_ratio)
    if inputs.ref_logprobs is None:
        terms[REFERENCE_KL] = 0.0
    else:
        distance = live(inputs.ref_logprobs - logprobs)
        growth = distance.expm1()
        terms[REFERENCE_KL] = growth - distance
        loss = loss + clip.beta * terms[REFERENCE_KL]
        gradient = gradient - clip.beta * growth
    if inputs.weights is not None:
        loss, gradient = loss * inputs.weights, gradient * inputs.weights
    terms[OBJECTIVE] = loss
    for row, flags in ((CLIP_LOW, pick.clipped_low), (CLIP_HIGH, pick.clipped_high), (DUAL_CLIP, pick.dual_clipped)):
        terms[row] = flags  # never of a masked token: its ratio is 1
    terms[CLIPPED] = pick.clipped_low | pick.clipped_high | pick.dual_clipped
    terms[LOGPROB] = logprobs
    terms[ENTROPY] = 0.0 if entropy is None else live(entropy)
    slope.copy_(gradient)


def totals(terms: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(Σ objective [], [13]: the mean of every row over the counting tokens, then how many these are)."""
    count = terms.new_full((1,), terms.shape[1]) if mask is None else mask.sum(0, keepdim=True).to(terms.dtype)
    sums = terms.sum(1)
    return sums[OBJECTIVE].clone(), torch.cat([sums / count.clamp(min=1.0), count])


class Reference(LogprobReference):
    """All kernels in plain torch."""

    surrogate_terms = staticmethod(surrogate_terms)
    sequence_log_ratio = staticmethod(sequence_log_ratio)
    sequence_log_weight = staticmethod(sequence_log_weight)
    totals = staticmethod(totals)

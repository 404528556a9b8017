"""Clipped policy-gradient losses from log-probabilities. `linear_policy_loss.py` has them from hidden states.

Over the M tokens with mask, weight w_t, importance weight c_t and k3_t = e^{d} - d - 1, d = log π_ref,t - log π_t:

    loss = 1/denominator · Σ_t w_t · (c_t · surrogate_t + beta · k3_t)

`policy_variants.py` says what surrogate, weights and default denominator each variant has. k3 is the estimator of
KL(π ‖ π_ref) by Schulman (http://joschu.net/blog/kl-approx.html): unbiased, never negative.

This file is the contract: the arithmetic in plain torch, the custom ops, their fakes and their autograd.
`policy_loss_triton.py` holds the kernels that replace `surrogate_terms` and `sequence_log_ratio` on CUDA.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from ._common import (
    accumulate_dtype,
    check_offsets,
    define_op,
    require_cu_seqlens,
    require_dtype,
    require_floating,
    require_one_of,
    require_shape,
    segment_ids,
)
from .logprob import Reference as LogprobReference
from .logprob import scaled
from .policy_variants import VARIANTS, LossTokens, clipped, truncated

# Rows of `terms` [8, M], everything a step reports per token. Tokens without mask hold 0 everywhere.
OBJECTIVE, SURROGATE, LOG_RATIO, APPROX_KL, REFERENCE_KL, CLIP_LOW, CLIP_HIGH, DUAL_CLIP = range(8)
NUM_TERMS = 8


# ---- the mathematics -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Clip:
    """Which surrogate, and its constants. dual 0 means none."""

    surrogate: str
    low: float
    high: float
    dual: float
    beta: float

    def constants(self) -> list[float]:
        return [self.low, self.high, self.dual, self.beta]


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What the loss needs per token beside log π_t; all [M], float32 but for the bool mask; None where not given."""

    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor | None
    weights: Tensor | None
    ref_logprobs: Tensor | None
    is_ratio: Tensor | None

    def part(self, rows: slice) -> "TokenInputs":
        return TokenInputs(*(None if t is None else t[rows] for t in self.columns()))

    def columns(self) -> tuple[Tensor | None, ...]:
        return (self.old_logprobs, self.advantages, self.mask, self.weights, self.ref_logprobs, self.is_ratio)


def sequence_log_ratio(logprobs: Tensor, inputs: TokenInputs, cu_seqlens: Tensor) -> Tensor:
    """Mean of log π - log π_old over the counting tokens of a sequence, given back to each of its tokens. [M]"""
    ids = segment_ids(cu_seqlens, logprobs.numel())
    log_ratio = logprobs - inputs.old_logprobs
    live = torch.ones_like(log_ratio)
    if inputs.mask is not None:
        log_ratio, live = torch.where(inputs.mask, log_ratio, 0.0), inputs.mask.to(log_ratio.dtype)
    zeros = log_ratio.new_zeros(cu_seqlens.numel() - 1)
    mean = zeros.index_add(0, ids, log_ratio) / zeros.index_add(0, ids, live).clamp_(min=1.0)
    return mean[ids]


def surrogate_terms(
    logprobs: Tensor, inputs: TokenInputs, sequence_ratio: Tensor | None, clip: Clip, terms: Tensor, slope: Tensor
) -> None:
    """Fill `terms` [8, M] and `slope` [M] = d objective_t / d log π_t."""
    mask = inputs.mask

    def live(x: Tensor) -> Tensor:
        return x if mask is None else torch.where(mask, x, 0.0)

    logprobs, advantages = live(logprobs), live(inputs.advantages)
    log_ratio = live(logprobs - inputs.old_logprobs)
    clipping = log_ratio if sequence_ratio is None else live(sequence_ratio)
    if clip.surrogate == "clip":
        pick = clipped(clipping, advantages, clip.low, clip.high, clip.dual)
    else:
        pick = truncated(logprobs, clipping, advantages, clip.low, clip.high)
    loss, gradient = pick.loss, pick.slope
    if inputs.is_ratio is not None:
        ratio = live(inputs.is_ratio)
        loss, gradient = loss * ratio, gradient * ratio
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
    weights = inputs.weights
    if weights is not None:
        loss, gradient = loss * weights, gradient * weights
    terms[OBJECTIVE] = loss
    for row, flags in ((CLIP_LOW, pick.clipped_low), (CLIP_HIGH, pick.clipped_high), (DUAL_CLIP, pick.dual_clipped)):
        terms[row] = flags  # never of a masked token: its ratio is 1
    slope.copy_(gradient)


class Reference(LogprobReference):
    """All kernels in plain torch."""

    surrogate_terms = staticmethod(surrogate_terms)
    sequence_log_ratio = staticmethod(sequence_log_ratio)


def loss_forward(
    kernels: ModuleType | type, logprobs: Tensor, inputs: TokenInputs, cu_seqlens: Tensor | None, clip: Clip
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ objective [], terms [8, M], slope [M])."""
    terms, slope = logprobs.new_empty(NUM_TERMS, logprobs.numel()), torch.empty_like(logprobs)
    sequence = None if cu_seqlens is None else kernels.sequence_log_ratio(logprobs, inputs, cu_seqlens)
    kernels.surrogate_terms(logprobs, inputs, sequence, clip, terms, slope)
    return terms[OBJECTIVE].sum(), terms, slope


# ---- ppo_loss: op, fake, autograd ------------------------------------------------------------------------------


def ppo_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    is_ratio: Tensor | None,
    cu_seqlens: Tensor | None,
    surrogate: str,
    clip: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = TokenInputs(old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio)
    return loss_forward(Reference, logprobs, inputs, cu_seqlens, Clip(surrogate, *clip))


_ppo_loss = define_op("policy_loss", ppo_loss_reference)


@_ppo_loss.register_fake
def _(logprobs, old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio, cu_seqlens,
      surrogate, clip):  # fmt: skip
    terms = logprobs.new_empty(NUM_TERMS, logprobs.shape[0])
    return logprobs.new_empty(()), terms, logprobs.new_empty(logprobs.shape[0])


def _ppo_setup(ctx, inputs, output) -> None:
    _, terms, slope = output
    ctx.mark_non_differentiable(terms, slope)
    ctx.save_for_backward(slope)


def _ppo_backward(ctx, grad: Tensor, *_ignored):
    (slope,) = ctx.saved_tensors
    return scaled(slope, grad, slope.dtype), *(None,) * 9


_ppo_loss.register_autograd(_ppo_backward, setup_context=_ppo_setup)


# ---- public functions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStats:
    """What to watch, without gradients. Scalars are float32 [] means over the loss tokens of the call.

    num_tokens: how many count. surrogate: loss without KL term and sequence weights. approx_kl: k3 of the old policy,
    ρ - 1 - log ρ. reference_kl: k3 of the reference, 0 without one. clip_low, clip_high, dual_clip: share of tokens
    whose ratio was cut below, above, or by the dual clip; clip_fraction: their sum. entropy: nats, or None.
    token_*: float32 [M], 0 where the mask is false.
    """

    num_tokens: Tensor
    surrogate: Tensor
    log_ratio: Tensor
    approx_kl: Tensor
    reference_kl: Tensor
    clip_fraction: Tensor
    clip_low: Tensor
    clip_high: Tensor
    dual_clip: Tensor
    entropy: Tensor | None
    token_logprobs: Tensor
    token_surrogate: Tensor
    token_log_ratio: Tensor
    token_reference_kl: Tensor
    token_clipped: Tensor
    token_entropy: Tensor | None


def summarise(terms: Tensor, tokens: LossTokens, logprobs: Tensor, entropy: Tensor | None) -> PolicyStats:
    """Means of `terms` over the counting tokens, on the device of the tensors."""
    count = tokens.count()
    means = (terms.sum(1) / count).unbind()
    if tokens.mask is not None:
        logprobs = torch.where(tokens.mask, logprobs, 0.0)
        entropy = None if entropy is None else torch.where(tokens.mask, entropy, 0.0)
    num_tokens = terms.new_full((), tokens.num_rows) if tokens.mask is None else tokens.mask.sum().to(terms.dtype)
    return PolicyStats(
        num_tokens=num_tokens,
        surrogate=means[SURROGATE],
        log_ratio=means[LOG_RATIO],
        approx_kl=means[APPROX_KL],
        reference_kl=means[REFERENCE_KL],
        clip_fraction=means[CLIP_LOW] + means[CLIP_HIGH] + means[DUAL_CLIP],
        clip_low=means[CLIP_LOW],
        clip_high=means[CLIP_HIGH],
        dual_clip=means[DUAL_CLIP],
        entropy=None if entropy is None else entropy.sum() / count,
        token_logprobs=logprobs,
        token_surrogate=terms[SURROGATE],
        token_log_ratio=terms[LOG_RATIO],
        token_reference_kl=terms[REFERENCE_KL],
        token_clipped=terms[CLIP_LOW:].sum(0),
        token_entropy=entropy,
    )


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    variant: str = "ppo",
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    beta: float = 0.0,
    is_ratio: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Policy-gradient loss of given log-probabilities; gradients reach `logprobs` only.

    logprobs, old_logprobs, advantages, ref_logprobs, is_ratio: floating [M], computed in float32 (float64 when
    logprobs is). loss_mask: bool [M], None when every token counts; what a masked token holds never matters.
    cu_seqlens: int32 [S+1] over the same M tokens; needed by "grpo" and "gspo".
    clip_low, clip_high: the ratio is held within 1 - clip_low and 1 + clip_high. dual_clip: above 1, bounds the loss
    of tokens with negative advantage ("cispo" has none).
    variant: a name of `policy_variants.VARIANTS`, whose functions give formula and source.
    beta: weight of the k3 estimate of KL(π ‖ π_ref), which needs ref_logprobs.
    is_ratio: importance weight of each token between sampler and trainer, already truncated; it multiplies the
    surrogate, not the KL term.
    denominator: divides the sum. Give that of the global batch (its loss tokens; its sequences for "grpo" and "gspo")
    when the batch is split, and gradients add up to those of the whole. None: the variant's default over this call.
    Returns (loss [], PolicyStats). Raises TypeError for dtypes, ValueError for shapes, ranges and names.
    """
    require_floating("logprobs", logprobs)
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs must have shape [M], got {list(logprobs.shape)}; flatten it, with a loss_mask.")
    dtype = accumulate_dtype(logprobs)
    tokens, inputs, sequence, clip, divisor = check_loss(
        logprobs.shape[0], dtype, old_logprobs, advantages, loss_mask, cu_seqlens, clip_low, clip_high, variant,
        dual_clip, ref_logprobs, beta, is_ratio, denominator,
    )  # fmt: skip
    total, terms, _ = _ppo_loss(logprobs.to(dtype), *inputs.columns(), sequence, clip.surrogate, clip.constants())
    return total / divisor, summarise(terms.detach(), tokens, logprobs.detach(), None)


def check_loss(
    num_rows: int,
    dtype: torch.dtype,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    clip_low: float,
    clip_high: float,
    variant: str,
    dual_clip: float | None,
    ref_logprobs: Tensor | None,
    beta: float,
    is_ratio: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[LossTokens, TokenInputs, Tensor | None, Clip, float | Tensor]:
    """Raise for what the loss cannot take; return the op's inputs and the divisor of its sum."""
    require_one_of("variant", variant, tuple(VARIANTS))
    if not 0.0 <= clip_low <= 1.0 or not clip_high >= 0.0:
        raise ValueError(f"clip_low must be within 0 and 1 and clip_high at least 0, got {clip_low} and {clip_high}.")
    if dual_clip is not None and (variant == "cispo" or not dual_clip > 1.0 + clip_high):
        raise ValueError(f"dual_clip must be above 1 + clip_high and is not for cispo, got {dual_clip} ({variant}).")
    if beta and ref_logprobs is None:
        raise ValueError(f"beta={beta} needs ref_logprobs.")
    if loss_mask is not None:
        require_dtype("loss_mask", loss_mask, torch.bool)
        require_shape("loss_mask", loss_mask, num_rows)
        loss_mask = loss_mask.contiguous()
    if cu_seqlens is not None:
        require_cu_seqlens(cu_seqlens)
        cu_seqlens = cu_seqlens.contiguous()
        if not torch.compiler.is_compiling():
            check_offsets(cu_seqlens, num_rows)
    columns = []
    for name, column in (
        ("old_logprobs", old_logprobs),
        ("advantages", advantages),
        ("ref_logprobs", ref_logprobs),
        ("is_ratio", is_ratio),
    ):
        if column is not None:
            require_floating(name, column)
            require_shape(name, column, num_rows)
            column = column.detach().to(dtype).contiguous()
        columns.append(column)
    tokens = LossTokens(num_rows, loss_mask, cu_seqlens)
    recipe = VARIANTS[variant](tokens)
    divisor = recipe.denominator if denominator is None else denominator
    if divisor is None:
        raise ValueError(f"variant={variant!r} needs denominator, such as sequences times the generation budget.")
    weights = None if recipe.weights is None else recipe.weights.to(dtype)
    inputs = TokenInputs(columns[0], columns[1], loss_mask, weights, columns[2], columns[3])
    clip = Clip(recipe.surrogate, float(clip_low), float(clip_high), float(dual_clip or 0.0), float(beta))
    return tokens, inputs, cu_seqlens if recipe.sequence_ratio else None, clip, divisor

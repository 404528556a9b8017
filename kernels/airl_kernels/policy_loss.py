"""Clipped policy-gradient losses from log-probabilities. `linear_policy_loss.py` has them from hidden states.

Over the M tokens with mask, weight w_t, importance weight c_t and k3_t = e^{d} - d - 1, d = log π_ref,t - log π_t:

    loss = 1/denominator · Σ_t w_t · (c_t · surrogate_t + beta · k3_t)

`policy_variants.py` says what surrogate, weights and default denominator each variant has. k3 is the estimator of
KL(π ‖ π_ref) by Schulman (http://joschu.net/blog/kl-approx.html): unbiased, never negative.

This file is the contract: the custom op, its fake, its autograd and what both losses check and report. The
arithmetic is in `_policy_terms.py`; `policy_loss_triton.py` holds the kernels that replace it on CUDA.
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
)
from ._policy_terms import (
    APPROX_KL,
    CLIP_HIGH,
    CLIP_LOW,
    CLIPPED,
    DUAL_CLIP,
    ENTROPY,
    IS_RATIO,
    LOG_RATIO,
    LOGPROB,
    NUM_TERMS,
    REFERENCE_KL,
    SURROGATE,
    Clip,
    Reference,
    TokenInputs,
)
from .logprob import scaled
from .policy_variants import VARIANTS, LossTokens

IS_LEVELS = ("token", "sequence")


def sequence_terms(
    kernels: ModuleType | type,
    logprobs: Tensor,
    inputs: TokenInputs,
    cu_seqlens: Tensor | None,
    by_sequence: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """(log-ratio, log importance weight) of each token's sequence [M], None where a token has its own."""
    ratio, weight = by_sequence
    return (
        kernels.sequence_log_ratio(logprobs, inputs, cu_seqlens) if ratio else None,
        kernels.sequence_log_weight(logprobs, inputs, cu_seqlens) if weight else None,
    )


def loss_forward(
    kernels: ModuleType | type,
    logprobs: Tensor,
    inputs: TokenInputs,
    cu_seqlens: Tensor | None,
    by_sequence: Sequence[bool],
    clip: Clip,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(Σ objective [], means [13], terms [12, M], slope [M])."""
    terms, slope = logprobs.new_empty(NUM_TERMS, logprobs.numel()), torch.empty_like(logprobs)
    sequence = sequence_terms(kernels, logprobs, inputs, cu_seqlens, by_sequence)
    kernels.surrogate_terms(logprobs, None, inputs, *sequence, clip, terms, slope)
    return *kernels.totals(terms, inputs.mask), terms, slope


# ---- ppo_loss: op, fake, autograd ------------------------------------------------------------------------------


def ppo_loss_reference(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
    advantages: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    ref_logprobs: Tensor | None,
    is_ratio: Tensor | None,
    sampler_logprobs: Tensor | None,
    cu_seqlens: Tensor | None,
    by_sequence: Sequence[bool],
    surrogate: str,
    clip: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = TokenInputs(old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio, sampler_logprobs)
    return loss_forward(Reference, logprobs, inputs, cu_seqlens, by_sequence, Clip(surrogate, *clip))


_ppo_loss = define_op("policy_loss", ppo_loss_reference)


@_ppo_loss.register_fake
def _(logprobs, old_logprobs, advantages, mask, weights, ref_logprobs, is_ratio, sampler_logprobs, cu_seqlens,
      by_sequence, surrogate, clip):  # fmt: skip
    means, terms = logprobs.new_empty(NUM_TERMS + 1), logprobs.new_empty(NUM_TERMS, logprobs.shape[0])
    return logprobs.new_empty(()), means, terms, logprobs.new_empty(logprobs.shape[0])


def _ppo_setup(ctx, inputs, output) -> None:
    _, means, terms, slope = output
    ctx.mark_non_differentiable(means, terms, slope)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slope)


def _ppo_backward(ctx, grad: Tensor | None, *_ignored):
    (slope,) = ctx.saved_tensors
    return None if grad is None else scaled(slope, grad, slope.dtype), *(None,) * 11


_ppo_loss.register_autograd(_ppo_backward, setup_context=_ppo_setup)


# ---- public functions ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyStats:
    """What to watch, without gradients. Scalars are float32 [] means over the loss tokens of the call.

    num_tokens: how many count. surrogate: loss without KL term and sequence weights. approx_kl: k3 of the old policy,
    ρ - 1 - log ρ. reference_kl: k3 of the reference, 0 without one. clip_low, clip_high, dual_clip: share of tokens
    whose ratio was cut below, above, or by the dual clip; clip_fraction: their sum. is_ratio: importance weight.
    entropy: nats, or None.
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
    is_ratio: Tensor
    entropy: Tensor | None
    token_logprobs: Tensor
    token_surrogate: Tensor
    token_log_ratio: Tensor
    token_approx_kl: Tensor
    token_reference_kl: Tensor
    token_clipped: Tensor
    token_is_ratio: Tensor
    token_entropy: Tensor | None


def summarise(means: Tensor, terms: Tensor, entropy: bool) -> PolicyStats:
    """What `totals` and `surrogate_terms` filled, by name; views, so that nothing is launched for it."""
    mean, token = means.detach().unbind(), terms.detach().unbind()
    return PolicyStats(
        num_tokens=mean[NUM_TERMS],
        surrogate=mean[SURROGATE],
        log_ratio=mean[LOG_RATIO],
        approx_kl=mean[APPROX_KL],
        reference_kl=mean[REFERENCE_KL],
        clip_fraction=mean[CLIPPED],
        clip_low=mean[CLIP_LOW],
        clip_high=mean[CLIP_HIGH],
        dual_clip=mean[DUAL_CLIP],
        is_ratio=mean[IS_RATIO],
        entropy=mean[ENTROPY] if entropy else None,
        token_logprobs=token[LOGPROB],
        token_surrogate=token[SURROGATE],
        token_log_ratio=token[LOG_RATIO],
        token_approx_kl=token[APPROX_KL],
        token_reference_kl=token[REFERENCE_KL],
        token_clipped=token[CLIPPED],
        token_is_ratio=token[IS_RATIO],
        token_entropy=token[ENTROPY] if entropy else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What both losses pass on to their ops, checked. divisor: of the sum, outside the op."""

    tokens: TokenInputs
    cu_seqlens: Tensor | None
    by_sequence: tuple[bool, bool]
    clip: Clip
    divisor: float | Tensor


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor | None,
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
    sampler_logprobs: Tensor | None = None,
    is_ceiling: float = 2.0,
    is_level: str = "token",
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, PolicyStats]:
    """Policy-gradient loss of given log-probabilities; gradients reach `logprobs` only.

    logprobs, old_logprobs, advantages, ref_logprobs, is_ratio, sampler_logprobs: floating [M], computed in float32
    (float64 when logprobs is). loss_mask: bool [M], None when every token counts; what a masked token holds never
    matters.
    old_logprobs: None, or NaN for a token, where the old policy is the one being trained: its ratio is 1 and has the
    gradient of 1, as with logprobs.detach(). In "gspo" such a token adds 0 to the sum of its sequence's log-ratios.
    cu_seqlens: int32 [S+1] over the same M tokens; needed by "grpo", "gspo" and is_level="sequence".
    clip_low, clip_high: the ratio is held within 1 - clip_low and 1 + clip_high. dual_clip: above 1, bounds the loss
    of tokens with negative advantage ("cispo" has none).
    variant: a name of `policy_variants.VARIANTS`, whose functions give formula and source.
    beta: weight of the k3 estimate of KL(π ‖ π_ref), which needs ref_logprobs.
    is_ratio: importance weight of each token between sampler and trainer, already truncated; it multiplies the
    surrogate, not the KL term.
    sampler_logprobs: in place of is_ratio; the weight is then min(π_old / π_sampler, is_ceiling), held constant, of
    the token or, with is_level="sequence", of the product over its sequence's loss tokens. NaN where no sampler was:
    the factor is 1.
    denominator: divides the sum. Give that of the global batch (its loss tokens; its sequences for "grpo" and "gspo")
    when the batch is split, and gradients add up to those of the whole. None: the variant's default over this call.
    Returns (loss [], PolicyStats). Raises TypeError for dtypes, ValueError for shapes, ranges and names.
    """
    require_floating("logprobs", logprobs)
    if logprobs.dim() != 1:
        raise ValueError(f"logprobs must have shape [M], got {list(logprobs.shape)}; flatten it, with a loss_mask.")
    dtype = accumulate_dtype(logprobs)
    given = check_loss(
        logprobs.shape[0], dtype, old_logprobs, advantages, loss_mask, cu_seqlens, clip_low, clip_high, variant,
        dual_clip, ref_logprobs, beta, is_ratio, sampler_logprobs, is_ceiling, is_level, denominator,
    )  # fmt: skip
    total, means, terms, _ = _ppo_loss(
        logprobs.to(dtype), *given.tokens.columns(), given.cu_seqlens, given.by_sequence, given.clip.surrogate,
        given.clip.constants(),
    )  # fmt: skip
    return total / given.divisor, summarise(means, terms, False)


def check_loss(
    num_rows: int,
    dtype: torch.dtype,
    old_logprobs: Tensor | None,
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
    sampler_logprobs: Tensor | None,
    is_ceiling: float,
    is_level: str,
    denominator: float | Tensor | None,
) -> LossInputs:
    """Raise for what the loss cannot take."""
    require_one_of("variant", variant, tuple(VARIANTS))
    _check_constants(clip_low, clip_high, variant, dual_clip, is_ceiling)
    require_one_of("is_level", is_level, IS_LEVELS)
    if beta and ref_logprobs is None:
        raise ValueError(f"beta={beta} needs ref_logprobs.")
    if is_ratio is not None and sampler_logprobs is not None:
        raise ValueError("is_ratio and sampler_logprobs both give the importance weight; pass one of them.")
    weight_by_sequence = sampler_logprobs is not None and is_level == "sequence"
    if weight_by_sequence and cu_seqlens is None:
        raise ValueError("is_level='sequence' needs cu_seqlens, int32 [S+1].")
    if loss_mask is not None:
        require_dtype("loss_mask", loss_mask, torch.bool)
        require_shape("loss_mask", loss_mask, num_rows)
        loss_mask = loss_mask.contiguous()
    if cu_seqlens is not None:
        require_cu_seqlens(cu_seqlens)
        cu_seqlens = cu_seqlens.contiguous()
        if not torch.compiler.is_compiling():
            check_offsets(cu_seqlens, num_rows)
    columns = {
        "old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs, "is_ratio": is_ratio,
        "sampler_logprobs": sampler_logprobs,
    }  # fmt: skip
    for name, column in columns.items():
        if column is not None:
            require_floating(name, column)
            require_shape(name, column, num_rows)
            columns[name] = column.detach().to(dtype).contiguous()
    recipe = VARIANTS[variant](LossTokens(num_rows, loss_mask, cu_seqlens))
    if denominator is None:
        if recipe.denominator is None:
            raise ValueError(f"variant={variant!r} needs denominator, such as sequences times the generation budget.")
        denominator = recipe.denominator()
    weights = None if recipe.weights is None else recipe.weights.to(dtype)
    # Without an old policy every ratio is 1, a sequence's too, and no slope waits for the rest of its sequence.
    by_sequence = recipe.sequence_ratio and old_logprobs is not None, weight_by_sequence
    constants = clip_low, clip_high, dual_clip or 0.0, beta, is_ceiling
    return LossInputs(
        tokens=TokenInputs(mask=loss_mask, weights=weights, **columns),
        cu_seqlens=cu_seqlens if any(by_sequence) else None,
        by_sequence=by_sequence,
        clip=Clip(recipe.surrogate, *(float(c) for c in constants)),
        divisor=denominator,
    )


def _check_constants(
    clip_low: float, clip_high: float, variant: str, dual_clip: float | None, is_ceiling: float
) -> None:
    if not 0.0 <= clip_low <= 1.0 or not clip_high >= 0.0:
        raise ValueError(f"clip_low must be within 0 and 1 and clip_high at least 0, got {clip_low} and {clip_high}.")
    if dual_clip is not None and (variant == "cispo" or not dual_clip > 1.0 + clip_high):
        raise ValueError(f"dual_clip must be above 1 + clip_high and is not for cispo, got {dual_clip} ({variant}).")
    if not is_ceiling > 0.0:
        raise ValueError(f"is_ceiling must be above 0, got {is_ceiling}.")

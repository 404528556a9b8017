"""Log-probabilities of given tokens from hidden states, without ever holding the [N, V] logits.

For a row with hidden state h, raw logits x = W h + b and scores

    z = softcap · tanh(logit_scale · x / softcap) / temperature        (z = logit_scale · x / temperature uncapped)

the results are  log p_y = z_y - log Σ_v exp z_v  and the entropy  H = -Σ_v p_v log p_v.  Their gradients in z are
onehot_y - p  and  -p · (log p + H).

Row chunks of logits are made by one matrix product, reduced, and in the backward pass overwritten by their own
gradient. With a frozen weight the forward pass also stores J = d log p_y / d h (one more product), so that the
backward pass only scales J by whatever gradient arrives: two products in all, for any loss. With a trainable
weight the logits are made again in the backward pass: four products.

This file is the contract: the mathematics in plain torch, the custom ops, their fakes and their autograd.
`logprob_triton.py` holds the two row kernels that replace `row_stats` and `logit_gradient_` on CUDA.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ._chunking import Gradients, Head, logit_chunks, make_head
from ._common import (
    accumulate_dtype,
    autocast_dtype,
    define_op,
    require_dtype,
    require_floating,
    require_plain_weight,
    require_shape,
)
from ._rows import gather_rows

_NEVER = -800.0  # a log-probability whose exponential is 0 in fp32 and fp64


class LogitMap(NamedTuple):
    """How raw logits become scores. softcap 0 means none."""

    temperature: float = 1.0
    softcap: float = 0.0
    logit_scale: float = 1.0


# ---- the mathematics -------------------------------------------------------------------------------------------


def scores(logits: Tensor, mapping: LogitMap) -> Tensor:
    """z [C, V] in the accumulation type; may be `logits` itself when nothing has to be done."""
    z = logits.to(accumulate_dtype(logits))
    if mapping.logit_scale != 1.0:
        z = z * mapping.logit_scale
    if mapping.softcap:
        z = torch.tanh(z / mapping.softcap) * mapping.softcap
    return z if mapping.temperature == 1.0 else z / mapping.temperature


def score_slope(logits: Tensor, mapping: LogitMap) -> Tensor | float:
    """dz/dx, elementwise."""
    slope = mapping.logit_scale / mapping.temperature
    if not mapping.softcap:
        return slope
    capped = torch.tanh(logits.to(accumulate_dtype(logits)) * (mapping.logit_scale / mapping.softcap))
    return slope * (1.0 - capped * capped)


def row_stats(
    logits: Tensor,
    targets: Tensor,
    mapping: LogitMap,
    logprob: Tensor,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
) -> None:
    """Fill log p_y, max z, log Σ exp(z - max z) and, when asked, H, all [C], for logits [C, V].

    Maximum and sum stay apart: adding them would lose the sum's digits when the logits are large.
    """
    z = scores(logits, mapping)
    torch.amax(z, 1, out=row_max)
    shifted = z - row_max[:, None]
    torch.sub(z.gather(1, targets[:, None])[:, 0], row_max, out=logprob)
    exps = shifted.exp_() if entropy is None else shifted.exp()
    total = exps.sum(1)
    torch.log(total, out=log_sum)
    logprob.sub_(log_sum)
    if entropy is not None:
        shifted.clamp_(min=_NEVER)  # where p is 0, p · log p is 0, not 0 · -inf
        torch.sub(log_sum, exps.mul_(shifted).sum(1).div_(total), out=entropy)


def logit_gradient_(
    logits: Tensor,
    targets: Tensor,
    mapping: LogitMap,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor | None,
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor | None = None,
) -> None:
    """Overwrite logits [C, V], or `out` [C, V], by g · (onehot_y - p) · dz/dx - e · p · (log p + H) · dz/dx.

    g = grad_logprob [C] (None: 1 everywhere), e = grad_entropy [C] (None: 0, and then `entropy` is not read).
    A row whose g and e are both 0 becomes 0, whatever its logits were.
    """
    g = torch.ones_like(row_max) if grad_logprob is None else grad_logprob
    dead = g == 0 if grad_entropy is None else (g == 0) & (grad_entropy == 0)
    slope = score_slope(logits, mapping)
    logp = scores(logits, mapping).sub_(row_max[:, None]).sub_(log_sum[:, None])
    if grad_entropy is None:
        gradient = logp.exp_().mul_(-g[:, None])
    else:
        p = logp.exp()
        pull = logp.clamp_(min=_NEVER).add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(g[:, None])
        gradient = p.mul_(pull).neg_()
    gradient.scatter_add_(1, targets[:, None], g[:, None])
    if not isinstance(slope, float) or slope != 1.0:
        gradient.mul_(slope)
    gradient.index_fill_(0, dead.nonzero()[:, 0], 0.0)
    target = logits if out is None else out
    if gradient is not target:
        target.copy_(gradient)


def logprob_forward(
    kernels: ModuleType | type,
    head: Head,
    targets: Tensor,
    mapping: LogitMap,
    entropy: bool,
    jacobian: bool,
    chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(log p [M], entropy [M] or [0], max [M], log-sum [M], J [M, H] or [0]); `kernels` holds the row kernels."""
    hidden, dtype = head.hidden, accumulate_dtype(head.hidden)
    logprob, row_max, log_sum = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
    entropies = torch.empty_like(logprob) if entropy else logprob.new_empty(0)
    jac = Gradients(kernels, head, 0, (jacobian, False, False))
    for part, logits in logit_chunks(head, chunk_rows):
        norms = row_max[part], log_sum[part], entropies[part] if entropy else None
        kernels.row_stats(logits, targets[part], mapping, logprob[part], *norms)
        if jacobian:
            jac.add(part, logits, targets, mapping, row_max, log_sum, None, None, None)
    return logprob, entropies, row_max, log_sum, jac.d_hidden


def logprob_backward(
    gradients: Gradients,
    targets: Tensor,
    norms: tuple[Tensor, Tensor, Tensor],
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    mapping: LogitMap,
    chunk_rows: int,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d hidden, d weight, d bias), empty where not needed, with the logits made a second time.

    weight, bias: as they were given, for the types of their gradients.
    """
    g = torch.zeros_like(norms[0]) if grad_logprob is None else grad_logprob.contiguous()
    e = None if grad_entropy is None else grad_entropy.contiguous()
    for part, logits in logit_chunks(gradients.head, chunk_rows):
        gradients.add(part, logits, targets, mapping, *norms, g, e)
    d_hidden, d_weight, d_bias = gradients.finish()
    return d_hidden, d_weight.to(weight.dtype), d_bias.to((weight if bias is None else bias).dtype)


def scale_rows(matrix: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """factors [M] or [] times matrix [M, ...], as `dtype`: computed wide and rounded once.

    A row whose factor is exactly 0 becomes 0 whatever it holds.
    """
    product = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
    torch.mul(matrix, factors.reshape(-1, *(1,) * (matrix.dim() - 1)), out=product)
    if factors.dim() == 0:
        return product if factors else product.zero_()
    return product.index_fill_(0, (factors == 0).nonzero()[:, 0], 0.0)


class Reference:
    """The row kernels in plain torch."""

    row_stats = staticmethod(row_stats)
    logit_gradient_ = staticmethod(logit_gradient_)
    scale_rows = staticmethod(scale_rows)


# ---- linear_logprob: ops, fakes, autograd ----------------------------------------------------------------------


def linear_logprob_reference(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    mapping: Sequence[float],
    entropy: bool,
    jacobian: bool,
    chunk_rows: int,
    num_tokens: int,
    fp32_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = make_head(hidden, weight, bias, num_tokens, fp32_logits)
    return logprob_forward(Reference, head, targets, LogitMap(*mapping), entropy, jacobian, chunk_rows)


_linear_logprob = define_op("logprob", linear_logprob_reference)


@_linear_logprob.register_fake
def _(hidden, weight, targets, bias, mapping, entropy, jacobian, chunk_rows, num_tokens, fp32_logits):
    per_row = [hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden)) for _ in range(3)]
    entropies = per_row[0].new_empty(hidden.shape[0] if entropy else 0)
    return per_row[0], entropies, per_row[1], per_row[2], hidden.new_empty(hidden.shape if jacobian else 0)


def linear_logprob_backward_reference(
    grad_logprob: Tensor | None,
    grad_entropy: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    mapping: Sequence[float],
    needs: Sequence[bool],
    chunk_rows: int,
    num_tokens: int,
    fp32_logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    head = make_head(hidden, weight, bias, num_tokens, fp32_logits)
    gradients, norms = Gradients(Reference, head, weight.shape[0], needs), (row_max, log_sum, entropy)
    slopes = grad_logprob, grad_entropy
    return logprob_backward(gradients, targets, norms, *slopes, LogitMap(*mapping), chunk_rows, weight, bias)


_linear_logprob_backward = define_op("logprob", linear_logprob_backward_reference)


@_linear_logprob_backward.register_fake
def _(grad_logprob, grad_entropy, hidden, weight, targets, bias, row_max, log_sum, entropy, mapping, needs,
      chunk_rows, num_tokens, fp32_logits):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        (weight if bias is None else bias).new_empty(weight.shape[0] if needs[2] else 0),
    )


def scale_rows_reference(matrix: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    return scale_rows(matrix, factors, dtype)


scaled = define_op("logprob", scale_rows_reference)


@scaled.register_fake
def _(matrix, factors, dtype):
    return matrix.new_empty(matrix.shape, dtype=dtype)


def _logprob_setup(ctx, inputs, output) -> None:
    hidden, weight, targets, bias, ctx.mapping, ctx.entropy, ctx.jacobian, *ctx.layout = inputs
    _, entropy, row_max, log_sum, jac = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, log_sum, jac, *(() if ctx.entropy else (entropy,)))
    recompute = () if ctx.jacobian and not ctx.entropy else (hidden, weight, targets, bias, row_max, log_sum, entropy)
    ctx.save_for_backward(jac, *recompute)


def _logprob_backward(ctx, grad_logprob, grad_entropy, *_ignored):
    jac, *recompute = ctx.saved_tensors
    need = (ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
    if grad_logprob is None and grad_entropy is None:
        d_hidden = d_weight = d_bias = None
    elif ctx.jacobian and grad_entropy is None:
        d_hidden, d_weight, d_bias = scaled(jac, grad_logprob, jac.dtype), None, None
    else:
        gradients = _linear_logprob_backward(grad_logprob, grad_entropy, *recompute, ctx.mapping, need, *ctx.layout)
        d_hidden, d_weight, d_bias = (g if wanted else None for g, wanted in zip(gradients, need, strict=True))
    return d_hidden, d_weight, None, d_bias, *(None,) * 6


_linear_logprob.register_autograd(_logprob_backward, setup_context=_logprob_setup)


# ---- public functions ------------------------------------------------------------------------------------------


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    rows: Tensor | None = None,
    entropy: bool = False,
    chunk_rows: int | None = None,
    num_tokens: int | None = None,
    fp32_logits: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability of `targets` under softmax of the vocabulary projection of `hidden`.

    hidden: [N, H]. weight: [V, H], same dtype. bias: [V] or None, same dtype. Inside autocast all three may differ
    (but for float64): products are in autocast's dtype, sums in float32, every gradient in its tensor's dtype; that
    of the weight is never rounded to autocast's.
    rows: int64 [M], the rows of hidden that count; the others reach no matrix product, and targets is [M]. In any
    order, and a row may come several times: its gradient is the sum, taken in a fixed order in fp32.
    targets: int64 [M] (or [N] without rows), within 0 and V-1 (num_tokens-1). One outside raises IndexError or
    RuntimeError on the CPU and gives NaN on CUDA, where raising would synchronise.
    temperature, softcap, logit_scale: see the formula at the top of this file.
    entropy: also return the entropy of each row's distribution, in nats.
    chunk_rows: rows of logits held at once; None chooses from free memory (a fixed budget on the CPU).
    num_tokens: only the first so many rows of weight and bias are tokens, the rest padding without probability whose
    gradient is 0. Cheaper than a slice, whose backward pass fills and copies a whole [V, H]. None: all V.
    fp32_logits: keep the logits in float32. In bfloat16 one near 24 is rounded by up to 0.06. A chunk takes 6 bytes a
    logit in place of 2, so it holds fewer rows. Always so for float16, whose own logits end at 65,504; a gradient of
    the logits, rounded to float16 like any other, still ends there.
    Returns float32 [M] (float64 for float64 inputs), or (log-probabilities, entropies).

    Products of the size of the vocabulary, forward and backward: 1 without gradients, 2 with a frozen weight and
    bias, 4 with a trainable one. Differentiating the entropy recomputes the logits (4 also when frozen).
    A logit of -inf has probability 0; a row with +inf or NaN gives NaN, as in torch. No second derivatives.
    Raises TypeError for modules, DTensors, quantised weights and, outside autocast, mixed dtypes; ValueError for
    shapes and ranges.
    """
    rows_hidden = check_head(hidden, weight, bias, targets, rows)
    mapping = check_mapping(temperature, softcap, logit_scale)
    training = torch.is_grad_enabled()
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    jacobian = training and frozen and hidden.requires_grad
    layout = check_layout(weight, chunk_rows, num_tokens, fp32_logits)
    result = _linear_logprob(rows_hidden, weight, targets, bias, mapping, entropy, jacobian, *layout)
    return (result[0], result[1]) if entropy else result[0]


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: Tensor | None) -> Tensor:
    """Raise for what the ops cannot take; return the rows of hidden that count, [M, H], as autocast wants them."""
    require_plain_weight("weight", weight)
    require_floating("hidden", hidden)
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [N, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}."
        )
    cast = autocast_dtype(hidden)
    dtypes = [hidden.dtype] if cast is None else [torch.float16, torch.bfloat16, torch.float32]
    require_dtype("weight", weight, *dtypes)
    if bias is not None:
        require_plain_weight("bias", bias)
        require_dtype("bias", bias, *dtypes)
        require_shape("bias", bias, weight.shape[0])
    require_dtype("targets", targets, torch.int64)
    if rows is not None:
        require_dtype("rows", rows, torch.int64)
        if rows.dim() != 1:
            raise ValueError(f"rows must have shape [M], got {list(rows.shape)}.")
        hidden = gather_rows(hidden, rows)
    require_shape("targets", targets, hidden.shape[0])
    return hidden if cast is None else hidden.to(cast)


def check_mapping(temperature: float, softcap: float | None, logit_scale: float) -> LogitMap:
    """Raise for values without meaning; return them as floats."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}.")
    if not logit_scale > 0:
        raise ValueError(f"logit_scale must be above 0, got {logit_scale}.")
    return LogitMap(float(temperature), float(softcap or 0.0), float(logit_scale))


def check_layout(
    weight: Tensor, chunk_rows: int | None, num_tokens: int | None, fp32_logits: bool
) -> tuple[int, int, bool]:
    """(rows of a chunk, 0 for the budget's; rows of weight that are tokens; fp32_logits), as the ops take them."""
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1 or None, got {chunk_rows}.")
    if num_tokens is not None and not 1 <= num_tokens <= weight.shape[0]:
        raise ValueError(f"num_tokens must be within 1 and the {weight.shape[0]} rows of weight, got {num_tokens}.")
    return chunk_rows or 0, num_tokens or weight.shape[0], fp32_logits

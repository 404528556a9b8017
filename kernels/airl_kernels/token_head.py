"""The discriminator's token head: one logit per token, its rewards, its losses and their gradients.

The logit of token t is  z_t = h_t · w + b + o_t,  with w [H] and b [1] shared by all tokens, or, with `index`,
row index_t of w [V, H] and entry index_t of b [V] (the action head). `offset` o_t is any per-token term from
outside, such as α·log π_ref(y_t).

This file is the contract: the custom ops, their fakes and their autograd, with the mathematics of `_head_math.py`.
The Triton kernels for CUDA tensors are in `token_head_triton.py`.
Source of the method: Fanconi et al., arXiv 2510.01857; the reward forms follow GAIL (arXiv 1606.03476) and
AIRL (arXiv 1710.11248), the WGAN form arXiv 1701.07875.
"""

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
    require_plain_weight,
    require_shape,
)
from ._head_math import bce_of, logits_of, pairwise_of, reward_of, wgan_of

REWARD_KINDS = ("logit", "gail", "logd")
LOSSES = ("bce", "wgan", "pairwise")


# ---- gradients from slopes ---------------------------------------------------------------------------------------


def _sum_rows(slope: Tensor, hidden: Tensor, weight: Tensor, index: Tensor | None) -> Tensor:
    """Σ_t slope_t·hidden_t, in all or by row of the weight."""
    if index is None:
        return slope @ hidden
    return hidden.new_zeros(weight.shape).index_add_(0, index, slope[:, None] * hidden)


def head_gradients_reference(
    slope: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None,
    need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d hidden, d weight, d bias) for d z = slope [N]. What is not needed comes back empty.

    Rows whose slope is 0 do not contribute, whatever they hold: where 0 · inf made the sum NaN, it is taken again
    without them.
    """
    dtype = accumulate_dtype(hidden, weight)
    d_hidden, d_weight, d_bias = hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if need_hidden:
        rows = weight if index is None else weight[index]
        d_hidden = (slope[:, None] * rows.to(dtype)).to(hidden.dtype)
    if need_weight:
        total = _sum_rows(slope, hidden.to(dtype), weight, index)
        if not total.isfinite().all():
            total = _sum_rows(slope, torch.where(slope[:, None] != 0, hidden.to(dtype), 0.0), weight, index)
        d_weight = total.to(weight.dtype)
        if bias is not None and (index is None or bias.numel() == 1):
            d_bias = slope.sum().reshape(bias.shape).to(bias.dtype)
        elif bias is not None:
            d_bias = slope.new_zeros(bias.numel()).index_add_(0, index, slope).reshape(bias.shape).to(bias.dtype)
    return d_hidden, d_weight, d_bias


# ---- head_gradients and scale_gradients_: the two ways to a backward pass ---------------------------------------


_head_gradients = define_op("token_head", head_gradients_reference)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_hidden: bool, need_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        bias.new_empty(bias.shape) if need_weight and bias is not None else weight.new_empty(0),
    )


@_head_gradients.register_fake
def _(slope, hidden, weight, bias, index, need_hidden, need_weight):
    return _fake_gradients(hidden, weight, bias, need_hidden, need_weight)


def scale_gradients__reference(gradients: list[Tensor], scale: Tensor) -> None:
    """Multiply in place by a scalar; 1, the usual one, costs no pass over memory."""
    factor = scale.item()
    if factor != 1.0:
        for gradient in gradients:
            gradient.mul_(factor)


_scale_gradients = define_op("token_head", scale_gradients__reference, mutates=("gradients",))


@_scale_gradients.register_fake
def _(gradients, scale):
    return None


# ---- token_rewards: op, fake, autograd -------------------------------------------------------------------------


def token_rewards_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, offset: Tensor | None,
    kind: str, temperature: float, clip: float | None,
) -> Tensor:  # fmt: skip
    z = logits_of(hidden, weight, bias, index, offset)
    return reward_of(z, kind, temperature, clip)[0]


_token_rewards = define_op("token_head", token_rewards_reference)


@_token_rewards.register_fake
def _(hidden, weight, bias, index, offset, kind, temperature, clip):
    return hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden, weight))


def token_rewards_backward_reference(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, offset: Tensor | None,
    kind: str, temperature: float, clip: float | None, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(d hidden, d weight, d bias, d z); recomputes the logits, which costs nothing beside reading hidden for d w."""
    z = logits_of(hidden, weight, bias, index, offset)
    slope = grad * reward_of(z, kind, temperature, clip)[1]
    return *head_gradients_reference(slope, hidden, weight, bias, index, need_hidden, need_weight), slope


_token_rewards_backward = define_op("token_head", token_rewards_backward_reference)


@_token_rewards_backward.register_fake
def _(grad, hidden, weight, bias, index, offset, kind, temperature, clip, need_hidden, need_weight):
    slope = hidden.new_empty(hidden.shape[0], dtype=accumulate_dtype(hidden, weight))
    return *_fake_gradients(hidden, weight, bias, need_hidden, need_weight), slope


def _rewards_setup(ctx, inputs, output) -> None:
    *tensors, ctx.kind, ctx.temperature, ctx.clip = inputs
    ctx.save_for_backward(*tensors)


def _rewards_backward(ctx, grad: Tensor):
    hidden, weight, bias, index, offset = ctx.saved_tensors
    need = ctx.needs_input_grad
    d_hidden, d_weight, d_bias, slope = _token_rewards_backward(
        grad, hidden, weight, bias, index, offset, ctx.kind, ctx.temperature, ctx.clip, need[0], need[1] or need[2]
    )
    d_offset = slope.to(offset.dtype) if need[4] else None
    wanted = (
        gradient if needed else None for gradient, needed in zip((d_hidden, d_weight, d_bias), need, strict=False)
    )
    return *wanted, None, d_offset, None, None, None


_token_rewards.register_autograd(_rewards_backward, setup_context=_rewards_setup)


# ---- discriminator_loss: op, fake, autograd --------------------------------------------------------------------


def discriminator_loss_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, weights: Tensor, index: Tensor | None,
    offset: Tensor | None, cu_seqlens: Tensor | None, pairs: Tensor | None, loss: str, label_smoothing: float,
    margin: float, need_hidden: bool, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss [], logits [N], d hidden, d weight, d bias, d z [N]): the gradients belong to d loss = 1."""
    live = weights != 0
    z = torch.where(live, logits_of(hidden, weight, bias, index, offset), 0.0)
    if loss == "bce":
        value, slope = bce_of(z, targets, weights, label_smoothing)
    elif loss == "wgan":
        value, slope = wgan_of(z, targets, weights)
    else:
        check_offsets(cu_seqlens, z.numel())
        value, slope = pairwise_of(z, weights, cu_seqlens, pairs, margin)
    slope = torch.where(live, slope, 0.0)
    return value, z, *head_gradients_reference(slope, hidden, weight, bias, index, need_hidden, need_weight), slope


_discriminator_loss = define_op("token_head", discriminator_loss_reference)


@_discriminator_loss.register_fake
def _(hidden, weight, bias, targets, weights, index, offset, cu_seqlens, pairs, loss, label_smoothing, margin,
      need_hidden, need_weight):  # fmt: skip
    dtype = accumulate_dtype(hidden, weight)
    z = hidden.new_empty(hidden.shape[0], dtype=dtype)
    gradients = _fake_gradients(hidden, weight, bias, need_hidden, need_weight)
    return z.new_empty(()), z, *gradients, torch.empty_like(z)


def _loss_setup(ctx, inputs, output) -> None:
    hidden, weight, bias, _, _, index, offset = inputs[:7]
    _, logits, *gradients, slope = output
    ctx.mark_non_differentiable(logits, *gradients, slope)
    ctx.set_materialize_grads(False)  # no zeros the size of hidden for the outputs nobody differentiates
    ctx.gradients = gradients
    ctx.save_for_backward(hidden, weight, bias, index, slope)
    ctx.offset_dtype = None if offset is None else offset.dtype


def _loss_backward(ctx, grad: Tensor, *_ignored):
    """The forward pass's gradients, scaled.

    In place the first time: a copy would double what the op moves. A repeated backward computes them anew, and a
    compiler that traces this fuses the product itself and must not see outputs of the op change.
    """
    hidden, weight, bias, index, slope = ctx.saved_tensors
    need = ctx.needs_input_grad
    if grad is None:
        return (None,) * len(need)
    if type(grad) is not Tensor:
        gradients = [(gradient.to(grad.dtype) * grad).to(gradient.dtype) for gradient in ctx.gradients]
    elif ctx.gradients is not None:
        gradients, ctx.gradients = ctx.gradients, None
        _scale_gradients(gradients, grad)
    else:
        gradients = _head_gradients(slope * grad, hidden, weight, bias, index, need[0], need[1] or need[2])
    wanted = (gradient if needed else None for gradient, needed in zip(gradients, need, strict=False))
    d_offset = (slope * grad).to(ctx.offset_dtype) if need[6] else None
    return *wanted, *(None,) * 3, d_offset, *(None,) * 7


_discriminator_loss.register_autograd(_loss_backward, setup_context=_loss_setup)


# ---- public functions ------------------------------------------------------------------------------------------


def token_rewards(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: Tensor | None = None,
    offset: Tensor | None = None,
    kind: str = "logit",
    temperature: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """Reward of every token, from the discriminator's hidden states, in one read of `hidden`.

    hidden: [N, H] floating. weight: [H], or [V, H] with `index`. bias: one entry, or [V] with `index`.
    index: int64 [N], the row of `weight` for every token. offset: floating [N], added to the logit.
    kind: "logit" (z/T, log D - log(1-D)), "gail" (-log(1-D)) or "logd" (log D), with D = sigmoid(z/T).
    temperature: T > 0. clip: bound on |reward|; the gradient is 0 beyond it.
    Returns float32 [N] (float64 for float64 inputs). Differentiable in hidden, weight, bias and offset.
    Raises TypeError for a module, DTensor or quantised weight; ValueError for shapes and unknown names.
    """
    _check_head(hidden, weight, bias, index, offset)
    require_one_of("kind", kind, REWARD_KINDS)
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}.")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip must be above 0 or None, got {clip}.")
    return _token_rewards(
        hidden, weight, bias, index, offset, kind, float(temperature), None if clip is None else float(clip)
    )


def discriminator_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    weights: Tensor,
    *,
    index: Tensor | None = None,
    offset: Tensor | None = None,
    loss: str = "bce",
    label_smoothing: float = 0.0,
    cu_seqlens: Tensor | None = None,
    pairs: Tensor | None = None,
    margin: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The discriminator's loss and logits; loss and gradients come from one pass over `hidden`.

    hidden, weight, bias, index, offset: as in `token_rewards`; all but index receive gradients.
    targets: floating [N], 1 for expert tokens, 0 for the rest. weights: floating [N], already normalised;
    a row of weight 0 is never read and its logit comes back as 0. No gradient reaches targets or weights.
    loss: "bce"       Σ weight·BCE(z, target·(1-ε) + ε/2), ε = label_smoothing;
          "wgan"      Σ weight·(1 - 2·target)·z, which needs a Lipschitz control outside;
          "pairwise"  mean over pairs of softplus(margin - (s_expert - s_perturbed)), where s is a sequence's mean
                      logit weighted by `weights`; needs cu_seqlens int32 [S+1] over the same rows and pairs int64
                      [S]: for a perturbed sequence the index of the expert sequence it was made from, else -1.
                      Pairs with a side of total weight 0 do not count; without pairs the loss is 0. Targets are
                      not used. This form reads `hidden` twice: a slope needs every logit of its pair.
    Returns (loss, logits): a float32 scalar, and float32 [N] without gradient (float64 for float64 inputs).
    Raises as `token_rewards`, and ValueError when "pairwise" lacks cu_seqlens or pairs.
    """
    _check_head(hidden, weight, bias, index, offset)
    require_one_of("loss", loss, LOSSES)
    for name, tensor in (("targets", targets), ("weights", weights)):
        require_floating(name, tensor)
        require_shape(name, tensor, hidden.shape[0])
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be within 0 and 1, got {label_smoothing}.")
    if loss == "pairwise":
        if cu_seqlens is None or pairs is None:
            raise ValueError("loss='pairwise' needs cu_seqlens and pairs.")
        require_cu_seqlens(cu_seqlens)
        require_dtype("pairs", pairs, torch.int64)
        require_shape("pairs", pairs, cu_seqlens.numel() - 1)
    else:
        cu_seqlens = pairs = None
    dtype = accumulate_dtype(hidden, weight)
    training = torch.is_grad_enabled()
    value, logits, *_ = _discriminator_loss(
        hidden,
        weight,
        bias,
        targets.detach().to(dtype),
        weights.detach().to(dtype),
        index,
        offset,
        cu_seqlens,
        pairs,
        loss,
        float(label_smoothing),
        float(margin),
        training and hidden.requires_grad,
        training and (weight.requires_grad or (bias is not None and bias.requires_grad)),
    )
    return value, logits.detach()


def _check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, offset: Tensor | None
) -> None:
    require_floating("hidden", hidden)
    require_plain_weight("weight", weight)
    if hidden.dim() != 2:
        raise ValueError(f"hidden must have shape [N, H], got {list(hidden.shape)}; flatten or pack it first.")
    num_tokens, width = hidden.shape
    if index is None:
        require_shape("weight", weight, width)
    else:
        if weight.dim() != 2 or weight.shape[1] != width:
            raise ValueError(f"weight must have shape [V, {width}] when index is given, got {list(weight.shape)}.")
        require_dtype("index", index, torch.int64)
        require_shape("index", index, num_tokens)
    if bias is not None:
        require_plain_weight("bias", bias)
        if bias.numel() != 1 and (index is None or bias.shape != weight.shape[:1]):
            raise ValueError(
                f"bias must hold one value{'' if index is None else ' or one per row of weight'}, "
                f"got {list(bias.shape)}."
            )
    if offset is not None:
        require_floating("offset", offset)
        require_shape("offset", offset, num_tokens)

"""From token rewards to advantages: discounted returns, group standardisation and GAE.

Sequences travel packed, rewards [N] cut by cu_seqlens [S+1], or padded, rewards [B, T] with a mask. A masked
position is transparent: it holds 0 afterwards, adds nothing and is not a time step, so the result equals that of
the valid tokens packed together.

Everything here is one recurrence, y_t = x_t + a_t·y_{t+1}, with a_t = 0 at the end of a sequence. It is never
computed as cumsum(x_t·γ^t)/γ^t, which overflows fp32 near 820 tokens at γ = 0.9.

This file is the contract: the mathematics in plain torch, the custom ops, their fakes and their autograd.
The Triton kernels for CUDA tensors are in `returns_triton.py`. Source of GAE: Schulman et al., arXiv 1506.02438.
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
    require_shape,
    segment_ids,
)

BASELINES = ("last_token", "all_tokens", "leave_one_out")


# ---- the mathematics -------------------------------------------------------------------------------------------


def recurrence(x: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + decay_t·y_{t+1} over [N], in log2(N) doubling steps.

    After the step of width k, y_t holds the terms t .. t+2k-1 and decay_t the product of 2k factors. Products that
    reached 0 are skipped, so a sequence's infinities stay its own.
    """
    y, width = x, 1
    while width < x.numel() and bool(decay.any()):
        reach = decay[:-width]
        carried = torch.where(reach != 0, reach * y[width:], 0.0)
        y = torch.cat((y[:-width] + carried, y[-width:]))
        decay = torch.cat((reach * decay[width:], torch.zeros_like(decay[-width:])))
        width *= 2
    return y


def adjoint_recurrence(x: Tensor, decay: Tensor) -> Tensor:
    """The transpose of `recurrence`: y_t = x_t + decay_{t-1}·y_{t-1}."""
    reversed_decay = torch.cat((decay.flip(0)[1:], torch.zeros_like(decay[:1])))
    return recurrence(x.flip(0), reversed_decay).flip(0)


def decays(cu_seqlens: Tensor, mask: Tensor | None, x: Tensor, valid: float) -> Tensor:
    """[N]: `valid` on valid tokens, 1 on masked ones, 0 on the last token of every sequence."""
    decay = torch.full_like(x, valid)
    if mask is not None:
        decay = torch.where(mask, decay, 1.0)
    ends = cu_seqlens[1:][cu_seqlens.diff() > 0].long() - 1
    return decay.index_fill(0, ends, 0.0)


def zero_masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else torch.where(mask, x, 0.0)


def group_statistics(
    rewards: Tensor, cu_seqlens: Tensor, group: Tensor, baseline: str, eps: float, min_std: float
) -> tuple[Tensor, Tensor]:
    """(mean [S], scale [S]): the reward of a token in sequence s is standardised as (r - mean_s)·scale_s.

    scale is 0 where nothing can be compared: a group with one sample, or, without a `min_std`, one whose samples
    are all equal.
    """
    lengths = cu_seqlens.diff()
    present = lengths > 0
    together = (group[:, None] == group[None, :]) & present[None, :]
    last = rewards[(cu_seqlens[1:].long() - 1).clamp(min=0)]
    if baseline == "leave_one_out":
        others = together & ~torch.eye(lengths.numel(), dtype=torch.bool, device=rewards.device)
        count = others.sum(1)
        mean = torch.where(others, last, 0.0).sum(1) / count.clamp(min=1)
        return mean, (count > 0).to(rewards.dtype)
    if baseline == "last_token":
        count = together.sum(1)
        mean = torch.where(together, last, 0.0).sum(1) / count.clamp(min=1)
        squares = torch.where(together, (last - mean[:, None]) ** 2, 0.0).sum(1)
        low = torch.where(together, last, torch.inf).amin(1)
        high = torch.where(together, last, -torch.inf).amax(1)
    else:
        segments = segment_ids(cu_seqlens, rewards.numel())
        zeros = rewards.new_zeros(lengths.numel())
        count = torch.where(together, lengths, 0).sum(1)
        mean = torch.where(together, zeros.index_add(0, segments, rewards), 0.0).sum(1) / count.clamp(min=1)
        squares = zeros.index_add(0, segments, (rewards - mean[segments]) ** 2)
        squares = torch.where(together, squares, 0.0).sum(1)
        low = torch.full_like(zeros, torch.inf).scatter_reduce(0, segments, rewards, "amin")
        high = torch.full_like(zeros, -torch.inf).scatter_reduce(0, segments, rewards, "amax")
        low = torch.where(together, low, torch.inf).amin(1)
        high = torch.where(together, high, -torch.inf).amax(1)
    std = (squares / (count - 1).clamp(min=1)).sqrt()
    comparable = (count > 1) & ((low != high) | (min_std > 0))
    return mean, torch.where(comparable, 1.0 / (std.clamp(min=min_std) + eps), 0.0)


def standardise(rewards: Tensor, cu_seqlens: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    segments = segment_ids(cu_seqlens, rewards.numel())
    token_scale = scale[segments]
    return torch.where(token_scale != 0, (rewards - mean[segments]) * token_scale, 0.0)


def next_values(values: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    """V of the next valid token of the same sequence; 0 past the last one."""
    held = recurrence(zero_masked(values, mask), decays(cu_seqlens, mask, values, 0.0))
    following = torch.cat((held[1:], torch.zeros_like(held[:1])))
    return following * (decays(cu_seqlens, None, values, 1.0) != 0)


def flat(tensors: tuple[Tensor | None, ...], cu_seqlens: Tensor | None) -> tuple[list[Tensor | None], Tensor]:
    """[N] each, and checked offsets of the sequences: those of [B, T] where none are given."""
    first = tensors[0]
    if cu_seqlens is None:
        batch, length = first.shape
        cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=first.device) * length
    else:
        check_offsets(cu_seqlens, first.numel())
    return [None if t is None else t.reshape(-1) for t in tensors], cu_seqlens


# ---- discounted_returns: op, fake, autograd --------------------------------------------------------------------


def discounted_returns_reference(
    rewards: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, gamma: float, adjoint: bool
) -> Tensor:
    """The returns A_t = Σ_{s>=t} γ^{s-t} r_s within each sequence; `adjoint` is the transpose, its own backward.

    rewards and mask: [N], or [B, T] without cu_seqlens, as in all ops here but `group_advantages`.
    """
    (x, kept), cu_seqlens = flat((rewards, mask), cu_seqlens)
    x = zero_masked(x, kept)
    decay = decays(cu_seqlens, kept, x, gamma)
    found = zero_masked(adjoint_recurrence(x, decay) if adjoint else recurrence(x, decay), kept)
    return found.clone().view(rewards.shape)


_discounted_returns = define_op("returns", discounted_returns_reference)


@_discounted_returns.register_fake
def _(rewards, cu_seqlens, mask, gamma, adjoint):
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


def _returns_setup(ctx, inputs, output) -> None:
    _, cu_seqlens, mask, ctx.gamma, ctx.adjoint = inputs
    ctx.save_for_backward(cu_seqlens, mask)


def _returns_backward(ctx, grad: Tensor):
    cu_seqlens, mask = ctx.saved_tensors
    return _discounted_returns(grad, cu_seqlens, mask, ctx.gamma, not ctx.adjoint), None, None, None, None


_discounted_returns.register_autograd(_returns_backward, setup_context=_returns_setup)


# ---- group_advantages: op, fake, autograd ----------------------------------------------------------------------


def group_advantages_reference(
    rewards: Tensor, cu_seqlens: Tensor, group: Tensor, gamma: float, baseline: str, eps: float, min_std: float
) -> Tensor:
    check_offsets(cu_seqlens, rewards.numel())
    if not rewards.numel():
        return rewards.clone()
    mean, scale = group_statistics(rewards, cu_seqlens, group, baseline, eps, min_std)
    standardised = standardise(rewards, cu_seqlens, mean, scale)
    return recurrence(standardised, decays(cu_seqlens, None, rewards, gamma))


_group_advantages = define_op("returns", group_advantages_reference)


@_group_advantages.register_fake
def _(rewards, cu_seqlens, group, gamma, baseline, eps, min_std):
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


# ---- gae: op, fake, autograd -----------------------------------------------------------------------------------


def gae_reference(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """δ_t = r_t + γ·V_{t+1} - V_t;  A_t = Σ_{s>=t} (γλ)^{s-t} δ_s;  returns = A + V."""
    (r, v, kept), cu_seqlens = flat((rewards, values, mask), cu_seqlens)
    errors = zero_masked(r + gamma * next_values(v, cu_seqlens, kept) - v, kept)
    advantages = zero_masked(recurrence(errors, decays(cu_seqlens, kept, errors, gamma * lam)), kept)
    returns = advantages + zero_masked(v, kept)
    return advantages.view(rewards.shape), returns.view(rewards.shape)


_gae = define_op("returns", gae_reference)


@_gae.register_fake
def _(rewards, values, cu_seqlens, mask, gamma, lam):
    empty = torch.empty_like(rewards, memory_format=torch.contiguous_format)
    return empty, torch.empty_like(empty)


def gae_backward_reference(
    d_advantages: Tensor, d_returns: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """(d rewards, d values): with e the adjoint scan of both gradients, d r = e, d V_t = d ret_t - e_t + γ·e_{t-1}."""
    shape = d_returns.shape
    (d_advantages, d_returns, mask), cu_seqlens = flat((d_advantages, d_returns, mask), cu_seqlens)
    d_advantages, d_returns = zero_masked(d_advantages, mask), zero_masked(d_returns, mask)
    decay = decays(cu_seqlens, mask, d_returns, gamma * lam)
    d_errors = zero_masked(adjoint_recurrence(d_advantages + d_returns, decay), mask)
    # The transpose of `next_values`: shift towards the past value, then carry over masked tokens.
    inside = decays(cu_seqlens, None, d_errors, 1.0) * d_errors
    shifted = torch.cat((torch.zeros_like(inside[:1]), inside[:-1]))
    previous = adjoint_recurrence(shifted, decays(cu_seqlens, mask, d_errors, 0.0))
    return d_errors.view(shape), zero_masked(d_returns - d_errors + gamma * previous, mask).view(shape)


_gae_backward = define_op("returns", gae_backward_reference)


@_gae_backward.register_fake
def _(d_advantages, d_returns, cu_seqlens, mask, gamma, lam):
    empty = torch.empty_like(d_returns, memory_format=torch.contiguous_format)
    return empty, torch.empty_like(empty)


def _gae_setup(ctx, inputs, output) -> None:
    _, _, cu_seqlens, mask, ctx.gamma, ctx.lam = inputs
    ctx.save_for_backward(cu_seqlens, mask)


def _gae_autograd(ctx, d_advantages: Tensor, d_returns: Tensor):
    cu_seqlens, mask = ctx.saved_tensors
    d_rewards, d_values = _gae_backward(d_advantages, d_returns, cu_seqlens, mask, ctx.gamma, ctx.lam)
    return d_rewards, d_values, None, None, None, None


_gae.register_autograd(_gae_autograd, setup_context=_gae_setup)


# ---- public functions ------------------------------------------------------------------------------------------


def discounted_returns(
    rewards: Tensor, gamma: float, cu_seqlens: Tensor | None = None, *, mask: Tensor | None = None
) -> Tensor:
    """A_t = Σ_{s>=t} γ^{s-t} r_s within each sequence.

    Packed: rewards [N] with cu_seqlens int32 [S+1] (int64 also works). Padded: rewards [B, T] with mask bool [B, T].
    Empty sequences and sequences of any length are fine. gamma: within 0 and 1.
    Returns float32 of the shape of rewards (float64 for float64). Differentiable in rewards.
    """
    _check_gamma("gamma", gamma)
    rewards = _checked(rewards, cu_seqlens, mask)
    return _discounted_returns(rewards, cu_seqlens, mask, float(gamma), False)


def group_advantages(
    rewards: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,
    gamma: float,
    *,
    baseline: str = "last_token",
    eps: float = 1e-6,
    min_std: float = 0.0,
) -> Tensor:
    """Rewards standardised within each group, then discounted returns (arXiv 2510.01857, section 3).

    rewards: floating [N]. cu_seqlens: int32 [S+1]. group: int64 [S], any labels; equal labels form a group and
    need not be neighbours. Empty sequences are ignored. r̃ = (r - mean)/(max(std, min_std) + eps), ddof 1, with
    mean and std by `baseline`:
      "last_token"     over the last token's reward of every sequence of the group;
      "all_tokens"     over every token of the group;
      "leave_one_out"  mean over the other sequences' last rewards, no division (eps and min_std unused).
    A group of one sequence (one token for "all_tokens") has nothing to compare with: its advantages are 0. So are
    those of a group whose samples are all equal, unless min_std > 0 gives it a scale.
    Returns float32 [N] (float64 for float64). No gradient: advantages are constants of the policy gradient.
    """
    _check_gamma("gamma", gamma)
    require_one_of("baseline", baseline, BASELINES)
    require_floating("rewards", rewards)
    require_cu_seqlens(cu_seqlens)
    require_dtype("group", group, torch.int64)
    require_shape("group", group, cu_seqlens.numel() - 1)
    if rewards.dim() != 1:
        raise ValueError(f"rewards must have shape [N], got {list(rewards.shape)}.")
    if eps < 0 or min_std < 0:
        raise ValueError(f"eps and min_std must not be negative, got {eps} and {min_std}.")
    rewards = rewards.detach().to(accumulate_dtype(rewards))
    return _group_advantages(rewards, cu_seqlens, group, float(gamma), baseline, float(eps), float(min_std))


def gae(
    rewards: Tensor,
    values: Tensor,
    gamma: float,
    lam: float,
    cu_seqlens: Tensor | None = None,
    *,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438): (advantages, returns), returns = advantages + values.

    rewards, values: [N] with cu_seqlens int32 [S+1], or [B, T] without; mask: bool of their shape, optional in
    both forms. Masked tokens (prompt, tool output, padding) are skipped: a valid token bootstraps from the next
    *valid* token's value, with one factor γ and one λ between them, and masked positions return 0. The value after
    a sequence's last valid token is 0: sequences are taken as finished.
    Returns float32 of the shape of rewards (float64 for float64). Differentiable in rewards and values.
    """
    _check_gamma("gamma", gamma)
    _check_gamma("lam", lam)
    require_floating("values", values)
    require_shape("values", values, *rewards.shape)
    rewards = _checked(rewards, cu_seqlens, mask)
    return _gae(rewards, values.to(rewards.dtype), cu_seqlens, mask, float(gamma), float(lam))


def _check_gamma(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be within 0 and 1, got {value}.")


def _checked(rewards: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> Tensor:
    """Raise for what neither form can be; return the rewards in the accumulation type."""
    require_floating("rewards", rewards)
    if mask is not None:
        require_dtype("mask", mask, torch.bool)
        require_shape("mask", mask, *rewards.shape)
    if cu_seqlens is not None:
        require_cu_seqlens(cu_seqlens)
        if rewards.dim() != 1:
            raise ValueError(f"rewards must have shape [N] with cu_seqlens, got {list(rewards.shape)}.")
    elif rewards.dim() != 2:
        raise ValueError(f"rewards of shape {list(rewards.shape)} needs cu_seqlens; without it, pass [B, T].")
    return rewards.to(accumulate_dtype(rewards))

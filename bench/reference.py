"""The ops written plainly, with every intermediate in full: what they must compute, and what a first version does.

On float64 inputs these are the references of `verify.py`; in the inputs' own type they are the "torch eager" peer
and the yardstick of accuracy. Products run in the inputs' type, everything after in at least float32. They share no
code with airl_kernels.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from bench.cases import Case
from bench.inputs import (
    CLIP,
    GAMMA,
    GROUP_SIZE,
    LABEL_SMOOTHING,
    LAMBDA,
    HeadInputs,
    LinearInputs,
    LogitInputs,
    PolicyInputs,
    SequenceInputs,
)


def wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


# ---- token head ------------------------------------------------------------------------------------------------


def token_rewards(inputs: HeadInputs) -> Tensor:
    hidden, weight, bias = inputs.hidden, inputs.weight, inputs.bias
    if inputs.index is None:
        return (hidden @ weight).to(wide(hidden)) + bias
    rows = weight[inputs.index].to(wide(hidden))
    return (hidden.to(rows.dtype) * rows).sum(-1) + bias


def discriminator_loss(inputs: HeadInputs) -> Tensor:
    """Σ weight·BCE(z, smoothed target)."""
    z = token_rewards(inputs)
    targets = (inputs.targets * (1 - LABEL_SMOOTHING) + LABEL_SMOOTHING / 2).to(z.dtype)
    return binary_cross_entropy_with_logits(z, targets, inputs.weights.to(z.dtype), reduction="sum")


# ---- sequences -------------------------------------------------------------------------------------------------


def _discount(rewards: Tensor, mask: Tensor | None) -> Tensor:
    """Σ_{s>=t} γ^{s-t} r_s of every row of [B, T], one step of time after the other."""
    running, columns = torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        following = rewards[:, t] + GAMMA * running
        running = following if mask is None else torch.where(mask[:, t], following, running)
        columns.append(running if mask is None else running * mask[:, t])
    return torch.stack(columns[::-1], 1)


def discounted_returns(inputs: SequenceInputs) -> Tensor:
    return _discount(inputs.rewards, inputs.mask)


def group_advantages(inputs: SequenceInputs) -> Tensor:
    """Standardised by the last tokens of a group (ddof 1), then discounted. Padding is not used here."""
    rewards = inputs.rewards
    parts = []
    for group in rewards.split(GROUP_SIZE):
        last = group[:, -1]
        if group.shape[0] == 1:
            parts.append(torch.zeros_like(group))
        else:
            parts.append((group - last.mean()) / (last.std() + 1e-6))
    return _discount(torch.cat(parts), None)


def gae(inputs: SequenceInputs) -> tuple[Tensor, Tensor]:
    """A_t = δ_t + γλ·A_{t+1}, δ_t = r_t + γ·V_{t+1} - V_t; padding is skipped and stays 0."""
    rewards, values, mask = inputs.rewards, inputs.values, inputs.mask
    running = following = torch.zeros_like(rewards[:, 0])
    columns = []
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + GAMMA * following - values[:, t] + GAMMA * LAMBDA * running
        live = torch.ones_like(step, dtype=torch.bool) if mask is None else mask[:, t]
        running, following = torch.where(live, step, running), torch.where(live, values[:, t], following)
        columns.append(running * live)
    advantages = torch.stack(columns[::-1], 1)
    return advantages, advantages + (values if mask is None else values * mask)


# ---- log-probabilities and policy losses -----------------------------------------------------------------------


def policy_loss(logprobs: Tensor, inputs: PolicyInputs | SequenceInputs, denominator: float | Tensor) -> Tensor:
    """PPO's clipped surrogate (arXiv 1707.06347, eq. 7), summed over the loss tokens and divided."""
    ratio = torch.exp(logprobs - inputs.old_logprobs)
    gain = torch.minimum(ratio * inputs.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * inputs.advantages)
    return -(gain if inputs.mask is None else gain * inputs.mask).sum() / denominator


def ppo_loss(inputs: SequenceInputs) -> Tensor:
    mask = inputs.mask
    return policy_loss(inputs.logprobs, inputs, inputs.rewards.numel() if mask is None else mask.sum())


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, -1, dtype=wide(logits))


def _pick(logp: Tensor, targets: Tensor) -> Tensor:
    return logp.gather(1, targets[:, None])[:, 0]


def selective_log_softmax(inputs: LogitInputs) -> Tensor:
    return _pick(_log_softmax(inputs.logits), inputs.targets)


def ppo_loss_from_logits(inputs: LogitInputs) -> Tensor:
    return policy_loss(selective_log_softmax(inputs), inputs, inputs.denominator)


def linear_logprob(inputs: LinearInputs) -> Tensor:
    return _pick(_log_softmax(inputs.hidden @ inputs.head.T), inputs.targets)


def linear_logprob_and_entropy(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
    logp = _log_softmax(inputs.hidden @ inputs.head.T)
    return _pick(logp, inputs.targets), -(logp.exp() * logp).sum(-1)


def linear_ppo_loss(inputs: LinearInputs) -> Tensor:
    return policy_loss(linear_logprob(inputs), inputs, inputs.denominator)


_BY_OP = {
    function.__name__: function
    for function in (
        token_rewards, discriminator_loss, discounted_returns, group_advantages, gae, linear_logprob, linear_ppo_loss,
        selective_log_softmax,
    )
}  # fmt: skip


def forward_of(case: Case):
    """The function above that computes `case`, from its inputs to a tensor or a tuple of tensors."""
    if case.op == "ppo_loss":
        return ppo_loss if case.family == "sequences" else ppo_loss_from_logits
    if case.op == "linear_logprob" and case.entropy:
        return linear_logprob_and_entropy
    return _BY_OP[case.op]

"""The GRPO family as Liger-Kernel and TRL define it, from log-probabilities [B, T]: loss per token, and its mean.

Plain torch on [B, T], differentiable: next to the vocabulary projection this costs nothing. Per token, with
ρ = exp(log π - log π_old) of the token or, at sequence level, exp of the sequence's mean log-ratio, and advantage A:

    grpo, bnpo, dr_grpo, dapo, luspo   -min(ρA, clamp(ρ, 1-ε_low, 1+ε_high)·A), ρ at most delta
    cispo                              -min(ρ, ε_high)·A·log π, the ratio held constant
    sapo                               -4/τ·sigmoid(τ(ρ-1))·A, τ by the sign of A          (arXiv 2511.20347)
    vespo                              -φ(w)·A·log π, φ a detached gamma weight of the sequence's ratio w

plus beta · k3 of the reference. The names differ further in what the sum is divided by.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
TOKEN_LEVEL_ONLY = ("cispo", "sapo", "vespo")
LOG_RATIO_BOUND = 20.0  # vespo's bounds on logarithms of ratios; the lower one is log 1e-8
LOG_RATIO_FLOOR = math.log(1e-8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What is minimised. Raises ValueError for names and combinations without meaning."""

    beta: float
    epsilon_low: float
    epsilon_high: float
    loss_type: str
    importance_sampling_level: str
    max_completion_length: int | None
    sapo_temperature_pos: float
    sapo_temperature_neg: float
    delta: float | None
    use_bias_correction_kl: bool
    vespo_k_pos: float
    vespo_lambda_pos: float
    vespo_k_neg: float
    vespo_lambda_neg: float

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"Unknown loss_type {self.loss_type!r}; supported are {', '.join(LOSS_TYPES)}.")
        if self.importance_sampling_level not in ("token", "sequence"):
            raise ValueError(
                f"importance_sampling_level must be token or sequence, got {self.importance_sampling_level!r}."
            )
        if self.importance_sampling_level == "sequence" and self.loss_type in TOKEN_LEVEL_ONLY:
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type={self.loss_type!r}; "
                "use importance_sampling_level='token'."
            )
        if self.delta is not None and not self.delta > 0:
            raise ValueError(f"delta must be positive, got {self.delta}.")
        if self.delta is not None and self.loss_type in TOKEN_LEVEL_ONLY:
            raise ValueError(f"delta (two-sided clipping) is not supported for loss_type={self.loss_type!r}.")
        if self.loss_type == "sapo" and not (self.sapo_temperature_pos > 0 and self.sapo_temperature_neg > 0):
            raise ValueError(
                f"sapo_temperature_pos and sapo_temperature_neg must be positive, got {self.sapo_temperature_pos} "
                f"and {self.sapo_temperature_neg}."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTerms:
    """loss [B, T] with gradient, kl [B, T] (k3, with gradient) or None, clipped bool [B, T], never where masked."""

    loss: Tensor
    kl: Tensor | None
    clipped: Tensor


def token_terms(
    objective: Objective,
    logprobs: Tensor,
    old: Tensor | None,
    ref: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    is_ratio: Tensor | None,
    filled: bool = False,
) -> TokenTerms:
    """logprobs, old, ref: [B, T]. advantages: [B]. mask: bool [B, T]. is_ratio: [B, T] or [B, 1].

    old None: the policy samples itself, ratio 1. ref None with beta: k3 is 0, as of a policy to itself.
    filled: masked tokens have a loss and a KL as well, though no part in their sequence's ratio.
    """
    kept = torch.ones_like(mask) if filled else mask

    def live(values: Tensor) -> Tensor:
        return torch.where(kept, values, 0.0)

    logprobs = live(logprobs)
    gain = advantages.float().unsqueeze(1)
    log_ratio = live(logprobs - (logprobs.detach() if old is None else old))
    weight = log_ratio
    if objective.importance_sampling_level == "sequence":
        weight = torch.where(mask, log_ratio, 0.0).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    ratio = weight.exp()
    never = torch.zeros_like(ratio, dtype=torch.bool)
    if objective.loss_type == "cispo":
        loss = -ratio.detach().clamp(max=objective.epsilon_high) * gain * logprobs
        clipped = (ratio > objective.epsilon_high) & (gain > 0)
    elif objective.loss_type == "sapo":
        softness = torch.where(gain > 0, objective.sapo_temperature_pos, objective.sapo_temperature_neg)
        loss = -4.0 / softness * torch.sigmoid(softness * (ratio - 1.0)) * gain
        clipped = never
    elif objective.loss_type == "vespo":
        loss = -_vespo_weight(objective, log_ratio.detach(), gain, is_ratio) * gain * logprobs
        clipped = never
    else:
        low, high = 1.0 - objective.epsilon_low, 1.0 + objective.epsilon_high
        bounded = ratio if objective.delta is None else ratio.clamp(max=objective.delta)
        loss = -torch.minimum(bounded * gain, ratio.clamp(low, high) * gain)
        clipped = ((ratio < low) & (gain < 0)) | ((ratio > high) & (gain > 0))
    if is_ratio is not None and objective.loss_type != "vespo":
        loss = loss * is_ratio
    kl = None
    if objective.beta != 0.0:
        distance = live((logprobs.detach() if ref is None else ref) - logprobs)
        kl = torch.expm1(distance) - distance
        if objective.use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + objective.beta * kl
    return TokenTerms(loss=live(loss.expand_as(mask)), kl=kl, clipped=clipped.expand_as(mask) & mask)


@torch.no_grad()
def _vespo_weight(objective: Objective, log_ratio: Tensor, gain: Tensor, is_ratio: Tensor | None) -> Tensor:
    """φ(w) = e^λ·w^k·e^(-λw) of the sequence's ratio w [B, 1], with the sampler's correction in w. φ(1) = 1."""
    log_w = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND).sum(1, keepdim=True)
    if is_ratio is not None:
        log_w = log_w + is_ratio.log().clamp(LOG_RATIO_FLOOR, LOG_RATIO_BOUND).sum(1, keepdim=True)
    log_w = log_w.clamp(LOG_RATIO_FLOOR, LOG_RATIO_BOUND)
    k = torch.where(gain >= 0, objective.vespo_k_pos, objective.vespo_k_neg)
    rate = torch.where(gain >= 0, objective.vespo_lambda_pos, objective.vespo_lambda_neg).clamp(min=1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def reduce_terms(objective: Objective, loss: Tensor, mask: Tensor, num_items_in_batch: float | Tensor | None) -> Tensor:
    """The mean over the batch that loss_type stands for. loss: [B, T], 0 where masked. mask: bool [B, T]."""
    batch, length = mask.shape
    if objective.loss_type in ("grpo", "sapo"):
        return (loss.sum(1) / mask.sum(1).clamp(min=1)).sum() / batch
    if objective.loss_type == "luspo":
        return (loss * mask.sum(1, keepdim=True)).sum() / (batch * length)
    return loss.sum() / divisor(objective, mask, num_items_in_batch)


def divisor(objective: Objective, mask: Tensor, num_items_in_batch: float | Tensor | None) -> float | Tensor:
    """What bnpo, dr_grpo, dapo, cispo and vespo divide the sum over tokens by.

    dapo, cispo, vespo: num_items_in_batch, the loss tokens of the whole batch on all ranks, per rank; without it,
    the ranks' mean of this call's tokens (one all_reduce where torch.distributed runs).
    """
    if objective.loss_type == "dr_grpo":
        if objective.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' needs max_completion_length.")
        return float(mask.shape[0] * objective.max_completion_length)
    tokens = mask.sum().float()
    if objective.loss_type == "bnpo":
        return tokens.clamp(min=1.0)
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    ranks = torch.distributed.get_world_size() if distributed else 1
    if num_items_in_batch is not None:
        tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    elif distributed:
        torch.distributed.all_reduce(tokens)
    return (tokens / ranks).clamp(min=1.0)

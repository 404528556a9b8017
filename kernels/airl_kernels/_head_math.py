"""The token head in plain torch: logits, rewards and losses, with the derivative of each in the logit.

What the ops of `token_head.py` mean. Triton's version of the same arithmetic is in `_math_triton.py`.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ._common import accumulate_dtype, segment_ids


def logits_of(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, offset: Tensor | None
) -> Tensor:
    """z [N], accumulated in fp32 (fp64 for fp64 inputs)."""
    dtype = accumulate_dtype(hidden, weight)
    if index is None:
        z = hidden.to(dtype) @ weight.to(dtype)
    else:
        z = torch.linalg.vecdot(hidden.to(dtype), weight[index].to(dtype))
    if bias is not None:
        z = z + (bias[index] if index is not None and bias.numel() > 1 else bias.reshape(1)).to(dtype)
    return z if offset is None else z + offset


def reward_of(z: Tensor, kind: str, temperature: float, clip: float | None) -> tuple[Tensor, Tensor]:
    """The reward of every logit and its derivative dr/dz."""
    x = z / temperature
    if kind == "logit":  # log D - log(1 - D)
        reward, slope = x, torch.ones_like(x)
    elif kind == "gail":  # -log(1 - D)
        reward, slope = -logsigmoid(-x), torch.sigmoid(x)
    else:  # log D
        reward, slope = logsigmoid(x), torch.sigmoid(-x)
    if clip is not None:
        slope = torch.where(reward.abs() <= clip, slope, 0.0)
        reward = reward.clamp(-clip, clip)
    return reward, slope / temperature


def bce_of(z: Tensor, targets: Tensor, weights: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    """Σ_t weight_t · BCE(z_t, y_t) with y = target·(1-ε) + ε/2, and its derivative in z."""
    y = targets * (1.0 - label_smoothing) + 0.5 * label_smoothing
    # The products are skipped where their factor is 0, so that an infinite logit with a certain label costs 0.
    positive = torch.where(y > 0, -y * logsigmoid(z), 0.0)
    negative = torch.where(y < 1, -(1.0 - y) * logsigmoid(-z), 0.0)
    return (weights * (positive + negative)).sum(), weights * (torch.sigmoid(z) - y)


def wgan_of(z: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Σ_t weight_t · (1 - 2·target_t) · z_t: the rest's mean less the experts', and its derivative in z."""
    slope = weights * (1.0 - 2.0 * targets)
    return (slope * z).sum(), slope


def pairwise_of(z: Tensor, weights: Tensor, cu_seqlens: Tensor, pairs: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Mean over pairs of softplus(margin - (s_expert - s_perturbed)), and its derivative in z.

    s is a sequence's mean logit weighted by `weights`. A pair counts when both its sequences have weight.
    """
    segments = segment_ids(cu_seqlens, z.numel())
    w = weights.double()  # a sequence's sums, and the few numbers after them, in double
    zeros = w.new_zeros(pairs.numel())
    mass = zeros.index_add(0, segments, w)
    safe_mass = torch.where(mass > 0, mass, 1.0)
    score = zeros.index_add(0, segments, w * z) / safe_mass
    expert = pairs.clamp(min=0)
    counts = (pairs >= 0) & (mass > 0) & (mass[expert] > 0)
    share = counts / counts.sum().clamp(min=1)
    shortfall = margin - (score[expert] - score)
    loss = torch.where(counts, share * -logsigmoid(-shortfall), 0.0).sum()
    pull = torch.where(counts, share * torch.sigmoid(shortfall), 0.0)
    score_slope = pull.index_add(0, expert, -pull)  # + for the perturbed sequence, - for its expert
    return loss.to(z.dtype), ((score_slope / safe_mass)[segments] * w).to(z.dtype)

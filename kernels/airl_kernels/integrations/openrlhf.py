"""OpenRLHF's token log-probabilities and policy loss, with the signatures its code calls.

`patch()` puts them in place in a running OpenRLHF 0.11; or import them and use them by themselves. Where a result can
differ from OpenRLHF's own is listed in docs/integrations/openrlhf.md.
"""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..policy_loss import ppo_loss
from ..selective import selective_log_softmax
from ._swap import Patch, Swap

SUPPORTED = ("0.11",)
PROBABILITY_FLOOR = 1e-6  # OpenRLHF holds probabilities within 1e-6 and 1 - 1e-6 before a binary KL


def patch() -> None:
    """From now on OpenRLHF computes token log-probabilities and the policy loss with airl_kernels.

    To be called in every process that trains; docs/examples/openrlhf.md shows how.
    Raises RuntimeError when OpenRLHF is absent, of another version than `SUPPORTED`, or patched already.
    """
    _PATCH.apply()


def _install(swap: Swap) -> None:
    swap.replace("openrlhf.models.utils", "log_probs_from_logits", log_probs_from_logits)
    swap.replace("openrlhf.models.loss", "PolicyLoss", PolicyLoss)


_PATCH = Patch("openrlhf", SUPPORTED, _install)


def unpatch() -> None:
    """Undo `patch()`. Raises RuntimeError when nothing is patched."""
    _PATCH.undo()


def patched() -> contextlib.AbstractContextManager[None]:
    """`patch()` for the length of a with block."""
    return _PATCH.applied()


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """log_softmax(logits / temperature) at `labels`: float32 in the shape of labels.

    logits: [..., V]. labels: int64 [...], within 0 and V-1. The logits are left as they are.
    """
    return selective_log_softmax(logits, labels, temperature=temperature)


class PolicyLoss(torch.nn.Module):
    """OpenRLHF's clipped policy loss: PPO per token or GSPO, with its correction for the sampler's own policy.

    clip_eps_low, clip_eps_high, dual_clip: of the ratio (arXiv 1707.06347; arXiv 1912.09729).
    token_level_loss: mean over tokens; False, mean over each sequence and then over the sequences.
    policy_loss_type: "ppo", or "gspo" (arXiv 2507.18071), which averages per sequence.
    is_correction_*: weights by, or filters on, π_old / π_rollout; level "off", "token" or "seq", mode "mask" (outside
    the threshold counts nothing) or "clip", gating on the "ratio", the "binary_kl" or the "tv" distance.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: Sequence[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("policy_loss_type", policy_loss_type, ("ppo", "gspo")),
            ("is_correction_level", is_correction_level, ("off", "token", "seq")),
            ("is_correction_mode", is_correction_mode, ("mask", "clip")),
            ("is_correction_gating", is_correction_gating, ("ratio", "binary_kl", "tv")),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                "is_correction_mode=clip is for is_correction_level=token with is_correction_gating=ratio."
            )
        divergence = is_correction_gating != "ratio" and is_correction_level != "off"
        if divergence and is_correction_threshold[0] > 0:
            raise ValueError(f"is_correction_gating={is_correction_gating} needs a lower threshold of 0.")
        if dual_clip is not None and not dual_clip > 1.0 + clip_eps_high:
            raise ValueError(f"dual_clip must be above 1 + clip_eps_high, got {dual_clip}.")
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = tuple(is_correction_threshold)

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | None = None,
        global_batch_size: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """(loss, share of clipped tokens, k1 of the old policy, k1 of the sampler or None, share filtered or None).

        All per-token arguments: [B, T]; action_mask 1 where a token counts, None for all. batch_num_tokens (per
        token) or global_batch_size (per sequence): the denominator of the whole batch, times 1 / dp_size.
        """
        corrected = self.is_correction_level != "off"
        if corrected and rollout_log_probs is None:
            raise ValueError(f"is_correction_level={self.is_correction_level} needs rollout_log_probs.")
        mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask.bool()
        base = rollout_log_probs if corrected and self.policy_loss_type == "gspo" else old_log_probs
        sampler_kl = filtered = weight = None
        if corrected and self.policy_loss_type == "ppo":
            weight, filtered = self._correction(old_log_probs, rollout_log_probs, mask)
            sampler_kl = _mean(rollout_log_probs - old_log_probs, mask)
        length = mask.sum(1)
        if self.token_level_loss:
            divisor, total = mask.sum().clamp(min=1), batch_num_tokens
        else:
            divisor, total = (length > 0).sum().clamp(min=1), global_batch_size
        if total is not None:
            divisor = total / dp_size
        if self.policy_loss_type == "gspo":
            loss, clipped = self._sequence_loss(log_probs, base, advantages, mask, length)
            loss = loss / divisor
        else:
            loss, clipped = self._token_loss(log_probs, old_log_probs, advantages, mask, weight, divisor)
        drift = _mean((old_log_probs - log_probs).detach(), mask)
        return loss, clipped, drift, sampler_kl, filtered

    def _token_loss(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        weight: Tensor | None,
        divisor: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        batch, length = mask.shape
        ends = torch.arange(batch + 1, dtype=torch.int32, device=mask.device) * length
        loss, stats = ppo_loss(
            log_probs.reshape(-1),
            old_log_probs.reshape(-1),
            advantages.expand_as(mask).reshape(-1),
            mask.reshape(-1),
            None if self.token_level_loss else ends,
            variant="ppo" if self.token_level_loss else "grpo",
            clip_low=self.clip_eps_low,
            clip_high=self.clip_eps_high,
            dual_clip=self.dual_clip,
            is_ratio=None if weight is None else weight.expand_as(mask).reshape(-1),
            denominator=divisor,
        )
        return loss, stats.clip_low + stats.clip_high

    def _sequence_loss(
        self, log_probs: Tensor, base: Tensor, advantages: Tensor, mask: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Σ over sequences of the mean over their tokens, share of clipped tokens).

        Not `ppo_loss(variant="gspo")`: where advantages differ within a sequence, that is the paper's GSPO-token,
        whose gradient weighs each token by its own advantage; OpenRLHF weighs all by their mean.
        """
        counts = length.clamp(min=1)
        log_ratio = torch.where(mask, log_probs - base, 0.0).sum(1) / counts
        ratio = log_ratio.exp().unsqueeze(1)
        free, bound = ratio * advantages, ratio.clamp(1 - self.clip_eps_low, 1 + self.clip_eps_high) * advantages
        gain = torch.minimum(free, bound)
        if self.dual_clip is not None:
            gain = torch.where(advantages < 0, torch.maximum(gain, self.dual_clip * advantages), gain)
        loss = -(torch.where(mask, gain, 0.0).sum(1) / counts).sum()
        return loss, _mean((bound < free).float(), mask)

    def _correction(self, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(weight of each token's loss, share of tokens or sequences outside the threshold), without gradients."""
        low, high = self.is_correction_threshold
        by_sequence = self.is_correction_level == "seq"
        log_ratio = torch.where(mask, old - rollout, 0.0).detach()
        if self.is_correction_gating == "ratio":
            statistic = log_ratio
        else:
            p = rollout.detach().exp().clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
            q = old.detach().exp().clamp(PROBABILITY_FLOOR, 1 - PROBABILITY_FLOOR)
            kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
            statistic = torch.where(mask, kl if self.is_correction_gating == "binary_kl" else (p - q).abs(), 0.0)
        if by_sequence:
            statistic = statistic.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        if self.is_correction_gating == "ratio":
            statistic = statistic.exp()
        outside = (statistic < low) | (statistic > high)
        if self.is_correction_mode == "clip":
            weight = statistic.clamp(low, high)
        else:
            weight = torch.where(outside, 0.0, log_ratio.exp())
        return weight, outside.float().mean() if by_sequence else _mean(outside.float(), mask)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)

"""Policy-gradient variants: what is clipped, how tokens are weighted, and what the sum is divided by.

All share the notation  ρ_t = exp(log π_t - log π_old,t)  and advantages A_t per token. A variant is one small
function from the loss tokens to a `Recipe`; the two surrogates below are all the arithmetic there is.
To add one: write such a function and name it in `VARIANTS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ._common import segment_ids


@dataclass(frozen=True, slots=True)
class LossTokens:
    """The tokens a loss runs over. mask: bool [M] or None (all count). cu_seqlens: int32 [S+1] over the M, or None."""

    num_rows: int
    mask: Tensor | None
    cu_seqlens: Tensor | None

    def count(self) -> Tensor | float:
        """How many tokens count, at least 1."""
        return float(max(self.num_rows, 1)) if self.mask is None else self.mask.sum().clamp(min=1)

    def sequences(self, variant: str) -> Tensor:
        if self.cu_seqlens is None:
            raise ValueError(f"variant={variant!r} averages per sequence and needs cu_seqlens, int32 [S+1].")
        return self.cu_seqlens

    def sequence_mean(self, variant: str) -> tuple[Tensor, Callable[[], float]]:
        """(weights f32 [M], 1 / tokens of the own sequence that count; what counts the sequences)."""
        cu_seqlens = self.sequences(variant)
        ids = segment_ids(cu_seqlens, self.num_rows)
        if self.mask is None:
            lengths = cu_seqlens.diff()
        else:  # a sum of ones is exact in any order
            lengths = ids.new_zeros(cu_seqlens.numel() - 1).index_add_(0, ids, self.mask.long())
        return lengths.clamp(min=1).float().reciprocal()[ids], lambda: float(max(cu_seqlens.numel() - 1, 1))


@dataclass(frozen=True, slots=True)
class Recipe:
    """surrogate: "clip" or "cispo". weights: f32 [M], None for 1.

    denominator: called when the caller gives none (it may cost launches); None: the caller must.

    sequence_ratio: ρ is the sequence's, exp of the mean log-ratio, instead of the token's.
    """

    weights: Tensor | None
    denominator: Callable[[], Tensor | float] | None
    surrogate: str = "clip"
    sequence_ratio: bool = False


def ppo(tokens: LossTokens) -> Recipe:
    """Clipped surrogate, mean over tokens. Schulman et al. 2017, arXiv 1707.06347, eq. 7."""
    return Recipe(None, tokens.count)


def grpo(tokens: LossTokens) -> Recipe:
    """Clipped surrogate, mean over each sequence, then over sequences. Shao et al. 2024, arXiv 2402.03300, eq. 3."""
    return Recipe(*tokens.sequence_mean("grpo"))


def dapo(tokens: LossTokens) -> Recipe:
    """Mean over all tokens of the batch, clip_high above clip_low (0.28, 0.2). Yu et al. 2025, arXiv 2503.14476, eq. 8.

    Give the number of loss tokens of the global batch as `denominator` when it is split.
    """
    return Recipe(None, tokens.count)


def dr_grpo(tokens: LossTokens) -> Recipe:
    """Sum over tokens divided by a constant, so that length carries no weight. Liu et al. 2025, arXiv 2503.20783.

    The constant, sequences times the generation budget, cannot be known here: the caller gives it.
    """
    return Recipe(None, None)


def bnpo(tokens: LossTokens) -> Recipe:
    """Clipped surrogate, mean over the tokens of this call only, as in TRL's loss of that name."""
    return Recipe(None, tokens.count)


def cispo(tokens: LossTokens) -> Recipe:
    """-clip(ρ)·A·log π with clip(ρ) held constant: no token loses its gradient. MiniMax-M1, arXiv 2506.13585, eq. 4."""
    return Recipe(None, tokens.count, surrogate="cispo")


def gspo(tokens: LossTokens) -> Recipe:
    """Ratio and clip of the whole sequence. Zheng et al. 2025, arXiv 2507.18071, eq. 5, 7 and the token form 13.

    With A constant over a sequence this is GSPO; with A per token it is the paper's GSPO-token.
    """
    return Recipe(*tokens.sequence_mean("gspo"), sequence_ratio=True)


VARIANTS: dict[str, Callable[[LossTokens], Recipe]] = {
    "ppo": ppo,
    "grpo": grpo,
    "dapo": dapo,
    "dr_grpo": dr_grpo,
    "bnpo": bnpo,
    "cispo": cispo,
    "gspo": gspo,
}


# ---- the surrogates --------------------------------------------------------------------------------------------


class Surrogate(NamedTuple):
    """Per token, all [M]: loss, its derivative in log π_t, and the three ways a token can be clipped (bool)."""

    loss: Tensor
    slope: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    dual_clipped: Tensor


def clipped(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float) -> Surrogate:
    """-min(ρA, clamp(ρ, 1-clip_low, 1+clip_high)·A), and for A < 0 at most -dual_clip·A (arXiv 1912.09729, eq. 5).

    dual_clip 0 sets no such bound.
    Written by cases, so that an infinite ratio on the clipped side costs a finite loss and no gradient.
    """
    ratio = log_ratio.exp()
    high = (advantages > 0) & (ratio > 1.0 + clip_high)
    low = (advantages < 0) & (ratio < 1.0 - clip_low)
    dual = (advantages < 0) & (ratio > dual_clip) if dual_clip else torch.zeros_like(low)
    bound = torch.full_like(ratio, dual_clip)  # of two numbers alone `where` makes a float32
    bound = torch.where(high, 1.0 + clip_high, torch.where(low, 1.0 - clip_low, bound))
    stopped = high | low | dual
    loss = torch.where(advantages == 0, 0.0, -advantages * torch.where(stopped, bound, ratio))
    return Surrogate(loss, torch.where(stopped, 0.0, loss), low, high, dual)


def truncated(logprobs: Tensor, log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """-clamp(ρ, 1-clip_low, 1+clip_high)·A·log π, the clamped ratio held constant."""
    ratio = log_ratio.exp()
    low, high = ratio < 1.0 - clip_low, ratio > 1.0 + clip_high
    slope = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.where(advantages == 0, 0.0, slope * logprobs)
    return Surrogate(loss, slope, low, high, torch.zeros_like(low))

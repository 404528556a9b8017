"""verl's fused log-probabilities and two of its advantage functions, with the signatures its code calls.

`patch()` puts them in place in a running verl 0.9; or import a function and use it by itself. Where a result can
differ from verl's own is listed in docs/integrations/verl.md.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..logprob import linear_logprob
from ..returns import gae, group_advantages
from ._swap import Patch, Swap

SUPPORTED = ("0.9",)
WHITEN_EPS = 1e-8  # verl.utils.torch_functional: in masked_mean's denominator and under masked_whiten's root


def patch() -> None:
    """From now on verl computes log-probabilities, entropies, GAE and GRPO advantages with airl_kernels.

    To be called in every process that trains; docs/examples/verl.md shows how to have Ray's workers do it. Log-
    probabilities take this way where verl is told to fuse (actor_rollout_ref.model.use_fused_kernels=True).
    Raises RuntimeError when verl is absent, of another version than `SUPPORTED`, or patched already.
    """
    _PATCH.apply()


def _install(swap: Swap) -> None:
    from verl.trainer.ppo import core_algos

    swap.replace("verl.utils.experimental.torch_functional", "FusedLinearForPPO", FusedLinearForPPO)
    swap.replace("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy", linear_cross_entropy)
    for estimator, ours in (("gae", compute_gae_advantage_return), ("grpo", compute_grpo_outcome_advantage)):
        swap.replace("verl.trainer.ppo.core_algos", ours.__name__, ours)
        swap.replace_item(core_algos.ADV_ESTIMATOR_REGISTRY, estimator, ours)


_PATCH = Patch("verl", SUPPORTED, _install)


def unpatch() -> None:
    """Undo `patch()`. Raises RuntimeError when nothing is patched."""
    _PATCH.undo()


def patched() -> contextlib.AbstractContextManager[None]:
    """`patch()` for the length of a with block."""
    return _PATCH.applied()


# ---- log-probabilities and entropy -----------------------------------------------------------------------------


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `labels` and entropies under softmax(hidden · weightᵀ / temperature).

    hidden: [..., H]. weight: [V, H], same dtype. labels: integers [...], within 0 and V-1.
    reduction: of the log-probabilities only, as in verl: "none" keeps one per token, "sum" and "mean" give a scalar.
    dist_process_group: must be None or a group of one rank; a vocabulary split over ranks is not supported.
    Returns (log-probabilities float32 [M] or [], entropies float32 [M], nats), M the number of labels.
    """
    ranks = 1 if dist_process_group is None else torch.distributed.get_world_size(dist_process_group)
    if ranks != 1:
        raise ValueError(f"the vocabulary is split over {ranks} ranks; use tensor parallelism 1 or verl's own kernel.")
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction must be none, sum or mean, got {reduction!r}.")
    logprobs, entropy = _fused(hidden, weight, labels, temperature, None)
    if reduction.lower() == "none":
        return logprobs, entropy
    return logprobs.sum() if reduction.lower() == "sum" else logprobs.mean(), entropy


class FusedLinearForPPO(torch.nn.Module):
    """verl's module of that name: (log-probabilities, entropies) from hidden states, both in the shape of the ids.

    chunk_size: rows of logits held at once, None chooses from free memory. impl_backend: verl's choice of its own
    implementation, "torch" or "liger"; ours runs for both.
    """

    def __init__(self, chunk_size: int | None = None, impl_backend: str = "torch") -> None:
        super().__init__()
        if impl_backend not in ("torch", "liger"):
            raise ValueError(f"impl_backend must be torch or liger, got {impl_backend!r}.")
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """hidden_states: [T, H] or [B, T, H]. vocab_weights: [V, H]. input_ids: [T] or [B, T]. Both float32."""
        if input_ids.shape != hidden_states.shape[:-1]:
            raise ValueError(
                f"input_ids must have shape {list(hidden_states.shape[:-1])}, as hidden_states, "
                f"got {list(input_ids.shape)}."
            )
        logprobs, entropy = _fused(hidden_states, vocab_weights, input_ids, temperature, self.chunk_size)
        return logprobs.view(input_ids.shape), entropy.view(input_ids.shape)


def _fused(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float | Tensor, chunk_rows: int | None
) -> tuple[Tensor, Tensor]:
    return linear_logprob(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1).long(),
        temperature=float(temperature),
        entropy=True,
        chunk_rows=chunk_rows,
    )


# ---- advantages ------------------------------------------------------------------------------------------------


def compute_gae_advantage_return(
    token_level_rewards: Tensor,
    values: Tensor,
    response_mask: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
) -> tuple[Tensor, Tensor]:
    """(advantages whitened over the mask, returns before whitening), both float32 [B, T], 0 where the mask is 0.

    token_level_rewards, values: [B, T]. response_mask: [B, T], 1 for tokens of the policy; masked ones in between
    (tool output) are skipped, the values after them bootstrap. Source: arXiv 1506.02438, and verl's whitening.
    Raises ValueError when fewer than two tokens count, as verl does.
    """
    with torch.no_grad():
        mask = response_mask.bool()
        advantages, returns = gae(token_level_rewards, values, float(gamma), float(lam), mask=mask)
        count = mask.sum()
        if count < 2:
            raise ValueError(f"advantages are whitened over the tokens of response_mask, which has only {int(count)}.")
        mean = advantages.sum() / (count + WHITEN_EPS)  # masked advantages are 0
        squares = torch.where(mask, advantages - mean, 0.0).square().sum()
        variance = squares / (count + WHITEN_EPS) * (count / (count - 1))
        whitened = torch.where(mask, (advantages - mean) * torch.rsqrt(variance + WHITEN_EPS), 0.0)
    return whitened, returns


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Any,
    epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Each response's summed reward, standardised in its group and given to all its tokens: (advantages, the same).

    token_level_rewards, response_mask: [B, T]; the sum runs over all T, as in verl. index: [B] group labels, an array
    or a list of anything hashable, or an integer tensor. epsilon: added to the standard deviation (ddof 1).
    norm_adv_by_std_in_grpo: False subtracts the mean only (arXiv 2503.20783). config: not read.
    A group of one response keeps its score: mean 0, standard deviation 1, as verl has it. Returns float32 [B, T].
    """
    with torch.no_grad():
        scores = token_level_rewards.sum(-1).float()
        group, count = _labels(index, scores.device)
        if group.numel() != scores.numel():
            raise ValueError(f"index must name a group for each of the {scores.numel()} responses, got {group.numel()}")
        if norm_adv_by_std_in_grpo:
            ends = torch.arange(scores.numel() + 1, dtype=torch.int32, device=scores.device)
            advantages = group_advantages(scores, ends, group, 1.0, eps=epsilon)
            alone = scores / (1.0 + epsilon)
        else:
            means = torch.zeros_like(count, dtype=scores.dtype).index_add_(0, group, scores) / count
            advantages, alone = scores - means[group], scores
        advantages = torch.where(count[group] == 1, alone, advantages)
        spread = advantages.unsqueeze(-1) * response_mask
    return spread, spread


def _labels(index: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """(group of each response as int64 0..G-1 [B], responses of each group [G])."""
    if isinstance(index, Tensor):
        _, group, count = index.to(device).unique(return_inverse=True, return_counts=True)
        return group, count
    numbers: dict[Any, int] = {}
    group = torch.tensor([numbers.setdefault(label, len(numbers)) for label in index], dtype=torch.int64)
    return group.to(device), group.bincount(minlength=len(numbers)).to(device)

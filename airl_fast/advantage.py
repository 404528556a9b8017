"""From per-token rewards to per-token advantages, within each prompt's group."""

import torch
from airl_kernels import discounted_returns, group_advantages

from airl_fast.config import AdvantageConfig, RewardConfig
from airl_fast.granularity import reward_scale, trace_ends
from airl_fast.types import TraceBatch


def advantages(rewards: torch.Tensor, batch: TraceBatch, config: AdvantageConfig, reward: RewardConfig) -> torch.Tensor:
    """f32 [M] -> f32 [M]. Fanconi et al., arXiv 2510.01857, section 3.

    Each group's rewards are standardised by the mean and deviation of its completions' last rewards, the expert's
    among them, and summed backwards with discount gamma.
    """
    if reward.outcome_weight:
        rewards = rewards + reward.outcome_weight * (batch.per_token(batch.correct) & trace_ends(batch)).float()
    if config.mode == "discounted" and reward.granularity == "dense":
        result = _standardised_returns(rewards, batch, config, config.gamma)
    elif config.mode == "discounted":
        scale = reward_scale(batch, reward)
        # gamma 0 sums nothing: the standardised rewards alone, of which only the reward tokens' count.
        standardised = _standardised_returns(rewards, batch, config, 0.0) * scale
        result = discounted_returns(standardised, config.gamma, batch.loss_cu_seqlens)
    else:
        scale = reward_scale(batch, reward)
        if config.mode == "average":
            rewards = _standardised_returns(rewards, batch, config, 0.0)
        mean = _sequence_sum(rewards * scale, batch) / _sequence_sum((scale > 0).float(), batch)
        if config.mode == "leave_one_out":  # RLOO (Ahmadian et al. 2024): less the mean of the group's others
            count = _group_sum(torch.ones_like(mean), batch)
            others = (_group_sum(mean, batch) - mean) / (count - 1).clamp_min(1)
            mean = torch.where(count > 1, mean - others, 0.0)
        result = batch.per_token(mean)
    if config.position_baseline:
        result = _subtract_position_mean(result, batch)
    if config.normalise:
        result = result / result.square().mean().sqrt().clamp_min(1e-6)
    return result


def _standardised_returns(
    rewards: torch.Tensor, batch: TraceBatch, config: AdvantageConfig, gamma: float
) -> torch.Tensor:
    return group_advantages(rewards, batch.loss_cu_seqlens, batch.group, gamma, eps=config.eps, min_std=config.min_std)


def _sequence_sum(values: torch.Tensor, batch: TraceBatch) -> torch.Tensor:
    sequence = batch.per_token(torch.arange(batch.num_sequences, device=values.device))
    return values.new_zeros(batch.num_sequences).index_add_(0, sequence, values)


def _group_sum(values: torch.Tensor, batch: TraceBatch) -> torch.Tensor:
    """[S] -> [S]: the sum over the group each sequence belongs to."""
    return values.new_zeros(batch.num_sequences).index_add_(0, batch.group, values)[batch.group]


def _subtract_position_mean(values: torch.Tensor, batch: TraceBatch) -> torch.Tensor:
    """Take from each advantage the mean over its group at the same completion position.

    A baseline that depends on the position alone; it removes what every sample of the prompt shares there, such as
    the longer sums of early tokens.
    """
    longest = max(batch.loss_lengths)
    position = torch.arange(batch.num_loss_tokens, device=values.device) - batch.per_token(batch.loss_cu_seqlens[:-1])
    cell = batch.per_token(batch.group) * longest + position
    total = values.new_zeros(batch.num_sequences * longest).index_add_(0, cell, values)
    count = values.new_zeros(batch.num_sequences * longest).index_add_(0, cell, torch.ones_like(values))
    return values - (total / count.clamp_min(1))[cell]

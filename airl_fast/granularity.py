"""Which completion tokens carry a reward, and with what weight (design: dense, interval, sparse, multiscale)."""

import torch

from airl_fast.config import RewardConfig
from airl_fast.types import TraceBatch


def reward_tokens(batch: TraceBatch, reward: RewardConfig) -> torch.Tensor:
    """bool [M]: the tokens that carry a reward; the discriminator is trained on the same ones."""
    if reward.granularity == "dense":
        return torch.ones_like(batch.step_ends)
    if reward.granularity == "sparse":
        return trace_ends(batch)
    if reward.granularity == "multiscale":
        return batch.step_ends | batch.block_ends
    return batch.step_ends


def reward_scale(batch: TraceBatch, reward: RewardConfig) -> torch.Tensor:
    """f32 [M]: what a token's reward is multiplied by; 0 where it carries none.

    multiscale adds the three scales at the tokens that end a step, a block and the trace.
    """
    if reward.granularity != "multiscale":
        return reward_tokens(batch, reward).float()
    step, block, trace = reward.scale_weights
    return step * batch.step_ends.float() + block * batch.block_ends.float() + trace * trace_ends(batch).float()


def trace_ends(batch: TraceBatch) -> torch.Tensor:
    """bool [M]: the last token of every completion."""
    last = torch.zeros_like(batch.step_ends)
    last[batch.loss_cu_seqlens[1:].long() - 1] = True
    return last

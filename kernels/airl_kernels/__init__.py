"""Fused operations for adversarial inverse reinforcement learning and token-level policy gradients.

Depends on torch and triton only. Every function takes tensors of any device: CUDA tensors go to Triton kernels,
CPU tensors to the C++ kernels where they were built and to plain torch otherwise.
"""

from .returns import discounted_returns, gae, group_advantages
from .token_head import discriminator_loss, token_rewards

__all__ = ["discounted_returns", "discriminator_loss", "gae", "group_advantages", "token_rewards"]

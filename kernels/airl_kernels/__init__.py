"""Fused operations for adversarial inverse reinforcement learning and token-level policy gradients.

Depends on torch and triton only. Every function takes tensors of any device: CUDA tensors go to Triton kernels,
CPU tensors to the C++ kernels where they were built and to plain torch otherwise.
"""

from . import native
from .linear_policy_loss import linear_ppo_loss
from .logprob import linear_logprob
from .policy_loss import PolicyStats, ppo_loss
from .returns import discounted_returns, gae, group_advantages
from .selective import selective_log_softmax
from .token_head import discriminator_loss, token_rewards

__all__ = [
    "PolicyStats",
    "discounted_returns",
    "discriminator_loss",
    "gae",
    "group_advantages",
    "linear_logprob",
    "linear_ppo_loss",
    "native",
    "ppo_loss",
    "selective_log_softmax",
    "token_rewards",
]

"""The GRPO baseline's advantages: verifiable rewards, standardised in the prompt's group (Shao et al. 2024)."""

from collections.abc import Sequence

import torch
from airl_kernels import group_advantages

from airl_fast.config import GrpoConfig
from airl_fast.data.verify import format_signals
from airl_fast.types import Trace, TraceBatch


def verifiable_rewards(traces: Sequence[Trace], config: GrpoConfig) -> list[float]:
    """One number a trace: correctness and format signals added with the configured weights."""
    rewards = []
    for trace in traces:
        signals = format_signals(trace.text)
        rewards.append(
            config.correct * float(bool(trace.correct))
            + config.strict_format * signals.strict
            + config.soft_format * signals.soft
            + config.xml_count * signals.xml
            + config.integer * signals.integer
        )
    return rewards


def advantages(rewards: Sequence[float], batch: TraceBatch, eps: float) -> torch.Tensor:
    """f32 [M]: (reward - mean) / (std + eps) of the trace's group, at each of its tokens; std has ddof 1.

    A trace is a segment of one reward to the op; a group whose rewards are all equal gets zeros.
    """
    device = batch.tokens.device
    value = torch.tensor(rewards, dtype=torch.float32).to(device)
    segments = torch.arange(batch.num_sequences + 1, dtype=torch.int32, device=device)
    return batch.per_token(group_advantages(value, segments, batch.group, 0.0, eps=eps))

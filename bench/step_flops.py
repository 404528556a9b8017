"""The model FLOPs of a step's updates: what the mathematics needs, not what an implementation spends.

2 operations per weight and row for a forward pass, twice that again for a backward pass through trainable weights
(Kaplan et al. 2020), and 4 · head size per head and pair of attending rows. Nothing computed twice counts twice: a
prompt counts once, recomputed logits not at all.
"""

from dataclasses import dataclass

import torch
from torch import nn

from airl_fast.lab import Lab
from airl_fast.types import Segments, TraceBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """10^12 operations of the phases of these names."""

    discriminator: float
    score: float
    policy: float


def update_work(lab: Lab, policy_batch: TraceBatch, judged: TraceBatch) -> Work:
    policy, reward = lab.policy.lm, lab.reward.model
    head = 2 * policy.head_weight.numel() * policy_batch.num_loss_tokens
    train = forward_flops(policy.backbone, policy_batch.segments) + head
    return Work(
        discriminator=_passes(reward.backbone) * forward_flops(reward.backbone, judged.segments) / 1e12,
        score=forward_flops(reward.backbone, policy_batch.segments) / 1e12,
        policy=_passes(policy.model) * train / 1e12,
    )


def forward_flops(backbone: nn.Module, segments: Segments) -> float:
    """Of one forward pass over the packed rows, without the output layer."""
    weights = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.Linear))
    config = backbone.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_pair = 4 * size * config.num_attention_heads * config.num_hidden_layers
    return 2.0 * weights * segments.num_rows + per_pair * attended_pairs(segments)


def attended_pairs(segments: Segments) -> float:
    """Pairs of rows that attend: triangles of prompts and completions, rectangles of completion and its prompt."""
    triangles = sum(n * (n + 1) / 2 for n in (*segments.prompts, *segments.completions))
    prompt_of = [p for p, count in zip(segments.prompts, segments.counts, strict=True) for _ in range(count)]
    return triangles + sum(p * n for p, n in zip(prompt_of, segments.completions, strict=True))


def _passes(model: nn.Module) -> int:
    """Forward, gradient of the inputs, and of the weights where they are trained."""
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return 3 if any(w.requires_grad for w in linear) else 2


def gemm_tflops(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The rate of a square product on this device, the best of `seconds`."""
    import time

    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        torch.mm(left, right)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best / 1e12

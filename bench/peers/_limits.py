"""Sizes beyond which a peer is not worth, or not capable of, running."""

import os

import torch

from bench.cases import Case, Unsupported
from bench.shapes import Shape

MOST_STEPS = 20_000  # some launches per step of time
_GIB = 1 << 30


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_room_for_logits(case: Case, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Full logits in their type, their log-softmax in float32, and with a backward pass the gradient of both."""
    if shape.family not in ("linear", "logits"):
        return
    elements = shape.tokens * shape.size("vocabulary")
    needed = elements * (dtype.itemsize + 4) * (2 if case.backward else 1)
    free = free_bytes(device)
    if needed > 0.9 * free:
        raise Unsupported(
            f"full logits and what is made of them take {needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free."
        )


def require_few_steps(case: Case, shape: Shape) -> None:
    if shape.family == "sequences" and case.op != "ppo_loss" and shape.size("length") > MOST_STEPS:
        raise Unsupported(f"it takes more than {MOST_STEPS} steps one after the other.")

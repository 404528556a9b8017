"""The most memory that a call holds at once beyond its inputs: temporaries, results and gradients."""

from collections.abc import Callable

import torch
from airl_kernels.testing import peak_bytes


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """MiB (2^20 bytes) of tensors alive at once during `run`, beyond what was alive before. `run` runs twice."""
    return peak_bytes(run, str(device)) / (1 << 20)

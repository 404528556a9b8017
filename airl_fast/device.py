"""Where a run computes."""

import torch

from airl_fast.config import Config
from airl_fast.errors import UserError


def pick_device(config: Config) -> torch.device:
    """The configured device; sets the number of threads with it, because results on the CPU depend on both."""
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        raise UserError(f"device={config.device}: no such device; use auto, cpu or cuda.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={config.device}: this machine has no usable CUDA GPU; use device=auto or device=cpu.")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={config.device}: only cpu and cuda are supported.")
    return device


def ops_backend(device: torch.device) -> str:
    """What the fused operations run on, for the log."""
    if device.type == "cuda":
        return "Triton"
    from airl_kernels import native

    return "native C++" if native.status().available else "plain torch"

"""The C++ CPU kernels: loaded at import where they were built, with a reason where they are not.

Loading registers them with PyTorch's dispatcher, below the same ops; nothing else changes.
AIRL_KERNELS_NATIVE=0 in the environment leaves them out.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_native.so")
OPS = (
    "token_rewards",
    "token_rewards_backward",
    "head_gradients",
    "discriminator_loss",
    "discounted_returns",
    "group_advantages",
    "gae",
    "gae_backward",
)


@dataclass(frozen=True, slots=True)
class NativeStatus:
    """available: whether the C++ kernels run. reason: one sentence, where they are or why they are absent."""

    available: bool
    reason: str


def _load() -> NativeStatus:
    if os.environ.get("AIRL_KERNELS_NATIVE") == "0":
        return NativeStatus(False, "AIRL_KERNELS_NATIVE=0 is set.")
    if not LIBRARY.exists():
        return NativeStatus(
            False, "not built; install a C++ compiler and `pip install --no-build-isolation ./kernels`."
        )
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:  # built against another torch
        return NativeStatus(False, f"{LIBRARY.name} does not fit torch {torch.__version__}, build it again: {error}")
    return NativeStatus(True, f"loaded from {LIBRARY}.")


_status = _load()


def status() -> NativeStatus:
    """Whether the C++ CPU kernels are in use; `airl-fast doctor` prints it."""
    return _status

"""Where the tests of this folder run: on a GPU, or, to try the tests themselves, on the CPU.

AIRL_GPU_TESTS_DEVICE=cpu runs them at smaller sizes on the CPU: the library's CPU kernels, or with TRITON_INTERPRET=1
the Triton kernels through their launchers. What only a GPU has (graphs, host synchronisation) is skipped there.
"""

import os

import pytest
import torch
from airl_kernels.testing import INTERPRETED, run_kernels_on_the_cpu

DEVICE = os.environ.get("AIRL_GPU_TESTS_DEVICE", "cuda")
ON_GPU = DEVICE == "cuda"
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]

needs_device = pytest.mark.skipif(
    ON_GPU and not torch.cuda.is_available(),
    reason="needs an NVIDIA GPU that torch can use (AIRL_GPU_TESTS_DEVICE=cpu tries the tests on the CPU)",
)
gpu_only = pytest.mark.skipif(not ON_GPU, reason="only a GPU has it")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

if INTERPRETED and not ON_GPU:
    run_kernels_on_the_cpu()


def pick(on_gpu: int, on_cpu: int) -> int:
    """A size, small enough for numpy where the kernels are interpreted."""
    return on_gpu if ON_GPU else on_cpu

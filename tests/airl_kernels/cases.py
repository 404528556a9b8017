"""Where and in what types the tests of the library run.

With TRITON_INTERPRET=1 the ops on CPU tensors run the Triton kernels through their launchers, so that every test is a
test of the kernels as well; `test_interpreted.py` starts such runs.
"""

import torch
from airl_kernels.testing import INTERPRETED, run_kernels_on_the_cpu

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# The interpreter computes in numpy, which has no bfloat16; the kernels' bf16 is covered by compilation and on GPUs.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
EXAMPLES = 4 if INTERPRETED else 60  # of a property test
SEEDS = range(1 if INTERPRETED else 6)

if INTERPRETED:
    run_kernels_on_the_cpu()

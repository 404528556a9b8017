"""The tests of every op once more, with the Triton kernels in place of torch.

Triton decides at import whether it interprets, so each run has its own process. `cases.py` puts the launchers behind
the ops there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FAMILIES = {  # a process of its own each, as few as the parts that fail should tell apart
    "head and returns": ("token_head", "token_head_autograd", "returns"),
    "logprob": ("logprob", "logprob_extremes", "selective", "rows", "logit_layout"),
    "policy loss": ("policy_loss", "absent_logprobs", "linear_policy_loss"),
}
WHICH_KERNELS = """
import torch, tests.airl_kernels.cases, airl_kernels
from triton.runtime.interpreter import GridExecutor
names, call = set(), GridExecutor.__call__
def record(self, *args, **kwargs):
    names.add(self.fn.__name__)
    return call(self, *args, **kwargs)
GridExecutor.__call__ = record
hidden, weight, ones = torch.randn(3, 4, requires_grad=True), torch.randn(4), torch.ones(3)
cu_seqlens, zeros = torch.tensor([0, 2, 3]), torch.zeros(3, dtype=torch.int64)
(airl_kernels.discriminator_loss(hidden, weight, torch.zeros(1), ones, ones)[0] * 2).backward()
airl_kernels.token_rewards(hidden, weight)
airl_kernels.group_advantages(ones, cu_seqlens, zeros[:2], 0.9, baseline="all_tokens")
airl_kernels.linear_logprob(hidden, torch.randn(9, 4), zeros, rows=zeros).sum().backward()
airl_kernels.ppo_loss(ones, ones, ones, None, cu_seqlens, variant="gspo")
print(*sorted(names))
"""


def interpreted(*arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "AIRL_KERNELS_NATIVE": "0", "PYTHONPATH": paths}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested on this machine's GPU")
@pytest.mark.timeout(1200)  # minutes on a busy core; each of its tests has the usual limit
@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_under_the_interpreter(family):
    files = [f"tests/airl_kernels/test_{name}.py" for name in FAMILIES[family]]
    run = interpreted("-m", "pytest", "-x", "-p", "no:cacheprovider", *files)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def test_the_interpreter_runs_the_kernels():
    """What the runs above rely on: CPU tensors really meet the kernels there."""
    run = interpreted("-c", WHICH_KERNELS)
    expected = (
        "_fused_kernel _gradient_kernel _join_kernel _moments_kernel _reduce_kernel _rewards_kernel _runs_kernel "
        "_scale_kernel _scan_kernel _sequence_kernel _stats_kernel _terms_kernel _totals_kernel"
    )
    assert run.stdout.strip() == expected, run.stderr[-2000:]

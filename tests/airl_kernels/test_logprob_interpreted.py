"""Every test of the log-probabilities and policy losses once more, with the Triton kernels in place of torch.

Triton decides at import whether it interprets, so the run has its own process. `logprob_cases.py` puts the launchers
behind the ops there.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FILES = (
    "test_rows.py",
    "test_logprob.py",
    "test_logprob_extremes.py",
    "test_selective.py",
    "test_policy_loss.py",
    "test_linear_policy_loss.py",
)
CALLS = """
import torch, airl_kernels, airl_kernels.logprob_triton as kernels, tests.airl_kernels.logprob_cases
calls = []
for name in ("row_stats", "logit_gradient_"):
    launch = getattr(kernels, name)
    setattr(kernels, name, lambda *a, launch=launch, name=name: (calls.append(name), launch(*a)))
hidden = torch.randn(2, 4, requires_grad=True)
airl_kernels.linear_logprob(hidden, torch.randn(9, 4), torch.tensor([1, 2])).sum().backward()
print(calls)
"""


def interpreted(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves are tested on this machine's GPU")
def test_kernels_under_the_interpreter():
    run = interpreted("-m", "pytest", "-x", "-p", "no:cacheprovider", *(str(HERE / name) for name in FILES))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout


def test_the_interpreter_runs_the_kernels():
    """The switch that the run above relies on: a kernel is really called for a CPU tensor."""
    run = interpreted("-c", CALLS)
    assert run.stdout.strip() == "['row_stats', 'logit_gradient_']", run.stderr[-2000:]

"""torch.compile of the plain versions."""

import shutil

import torch

from bench.cases import Case, Run, Unsupported, by_autograd
from bench.reference import forward_of
from bench.shapes import Shape

NAME = "torch.compile"
HOLDS_LOGITS = True  # all [N, V] of them
COMPILES_FOR_A_SHAPE = True


def version() -> str | None:
    return torch.__version__


def unavailable(device: torch.device) -> str | None:
    if device.type == "cpu" and shutil.which("g++") is None and shutil.which("clang++") is None:
        return "on the CPU it needs a C++ compiler, and there is none."
    return None


def prepare(case: Case, shape: Shape) -> Run:
    if case.op in ("discounted_returns", "group_advantages", "gae"):
        raise Unsupported("it would unroll the loop over time, one step of code per token.")
    torch._dynamo.reset()  # each problem is compiled for its own shape
    return by_autograd(case, torch.compile(forward_of(case), dynamic=False))

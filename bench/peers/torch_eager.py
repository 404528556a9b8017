"""Plain torch as first written: full logits, log_softmax and gather; returns one step of time after the other."""

import torch

from bench.cases import Case, Run, by_autograd
from bench.peers._limits import require_few_steps
from bench.reference import forward_of
from bench.shapes import Shape

NAME = "torch eager"
HOLDS_LOGITS = True  # all [N, V] of them


def version() -> str | None:
    return torch.__version__


def unavailable(device: torch.device) -> str | None:
    return None


def prepare(case: Case, shape: Shape) -> Run:
    require_few_steps(case, shape)
    return by_autograd(case, forward_of(case))

"""Returns as published trainers compute them: for each sequence, for each token, in Python."""

import torch
from torch import Tensor

from bench.cases import Case, Result, Run, Unsupported
from bench.inputs import GAMMA, SequenceInputs
from bench.shapes import Shape

NAME = "python loop"
MOST_TOKENS = 100_000


def version() -> str | None:
    return None


def unavailable(device: torch.device) -> str | None:
    return None


def prepare(case: Case, shape: Shape) -> Run:
    if case.op != "discounted_returns":
        raise Unsupported("it is not written as such a loop.")
    if shape.tokens > MOST_TOKENS:
        raise Unsupported(f"{shape.tokens} tokens one after the other are more than {MOST_TOKENS}.")
    return _discounted_returns


def _discounted_returns(inputs: SequenceInputs) -> Result:
    batch, longest = inputs.rewards.shape
    lengths = [longest] * batch if inputs.mask is None else inputs.mask.sum(1).tolist()
    out = torch.zeros_like(inputs.rewards)
    for b, length in enumerate(lengths):
        running: Tensor | float = 0.0
        for t in reversed(range(length)):
            running = inputs.rewards[b, t] + GAMMA * running
            out[b, t] = running
    return Result(outputs=(out,), gradients=())

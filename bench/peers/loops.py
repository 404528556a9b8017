"""Returns as published trainers compute them: for each sequence, for each token, in Python."""

import torch
from torch import Tensor

from bench.cases import Case, Result, Run, Unsupported
from bench.inputs import GAMMA, LAMBDA, SequenceInputs
from bench.peers._limits import require_few_steps
from bench.shapes import Shape

NAME = "python loop"


def version() -> str | None:
    return None


def unavailable(device: torch.device) -> str | None:
    return None


def prepare(case: Case, shape: Shape) -> Run:
    functions = {"discounted_returns": _discounted_returns, "gae": _gae}
    if case.op not in functions:
        raise Unsupported("it is not written as such a loop.")
    require_few_steps(case, shape, shape.tokens)
    return functions[case.op]


def _lengths(inputs: SequenceInputs) -> list[int]:
    batch, length = inputs.rewards.shape
    return [length] * batch if inputs.mask is None else inputs.mask.sum(1).tolist()


def _discounted_returns(inputs: SequenceInputs) -> Result:
    out = torch.zeros_like(inputs.rewards)
    for b, length in enumerate(_lengths(inputs)):
        running: Tensor | float = 0.0
        for t in reversed(range(length)):
            running = inputs.rewards[b, t] + GAMMA * running
            out[b, t] = running
    return Result(outputs=(out,), gradients=())


def _gae(inputs: SequenceInputs) -> Result:
    rewards, values = inputs.rewards, inputs.values
    out = torch.zeros_like(rewards)
    for b, length in enumerate(_lengths(inputs)):
        running: Tensor | float = 0.0
        following: Tensor | float = 0.0
        for t in reversed(range(length)):
            delta = rewards[b, t] + GAMMA * following - values[b, t]
            running = delta + GAMMA * LAMBDA * running
            following = values[b, t]
            out[b, t] = running
    live = 1.0 if inputs.mask is None else inputs.mask
    return Result(outputs=(out, out + values * live), gradients=())

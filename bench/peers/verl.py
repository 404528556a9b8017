"""verl's fused linear cross entropy: log π and entropy per token by its Triton kernels, any later gradient.

Of the package only verl/utils/kernel and what it imports has to be there: `bench/carry` lays out just that.
"""

import importlib.util

import torch
from torch import Tensor

from bench.cases import Case, Run, Unsupported, by_autograd
from bench.inputs import LinearInputs
from bench.peers._packages import installed, why_absent
from bench.reference import policy_loss
from bench.shapes import Shape

NAME = "verl"


def version() -> str | None:
    return installed("verl")


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its kernels need CUDA."
    if importlib.util.find_spec("verl") is None:
        return "verl is not installed (`python -m bench.carry` lays out the files that this needs)."
    return why_absent("verl", "verl.utils.kernel.linear_cross_entropy")


def prepare(case: Case, shape: Shape) -> Run:
    if case.family != "linear":
        raise Unsupported("it has no counterpart.")
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def both(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets, 1.0, "none")

    def logprobs(inputs: LinearInputs) -> Tensor:
        return both(inputs)[0]

    if case.op == "linear_ppo_loss":
        return by_autograd(case, lambda inputs: policy_loss(logprobs(inputs), inputs, inputs.denominator))
    return by_autograd(case, both if case.entropy else logprobs)

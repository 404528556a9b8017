"""cut-cross-entropy (arXiv 2411.09009): `linear_cross_entropy` without reduction is -log π."""

import torch
from torch import Tensor

from bench.cases import Case, Run, Unsupported, by_autograd
from bench.inputs import LinearInputs
from bench.peers._packages import installed, why_absent
from bench.reference import policy_loss
from bench.shapes import Shape

NAME = "cut-cross-entropy"
# By default its backward pass leaves out probabilities that vanish in bf16. Over the flat distributions of random
# inputs that is a few percent of the gradient, over a language model's much less.
TOLERANCE = 0.1


def version() -> str | None:
    return installed("cut-cross-entropy")


def unavailable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "its kernels need CUDA (its CPU implementation is torch.compile, a peer of its own)."
    return why_absent("cut-cross-entropy", "cut_cross_entropy")


def prepare(case: Case, shape: Shape) -> Run:
    if case.family != "linear" or case.entropy:
        raise Unsupported("it has no counterpart.")
    from cut_cross_entropy import linear_cross_entropy

    def logprobs(inputs: LinearInputs) -> Tensor:
        return -linear_cross_entropy(inputs.hidden, inputs.head, inputs.targets, reduction="none")

    if case.op == "linear_ppo_loss":
        return by_autograd(case, lambda inputs: policy_loss(logprobs(inputs).float(), inputs, inputs.denominator))
    return by_autograd(case, logprobs)

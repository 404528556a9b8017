"""Liger-Kernel's fused linear scaled cross entropy: log π per token, any later gradient, its logits never in memory.

On Hopper it needs its extra `cutedsl` (nvidia-cutlass-dsl) and bf16; elsewhere it is a loop over chunks in torch.
"""

import torch
from torch import Tensor

from bench.cases import Case, Run, Unsupported, by_autograd
from bench.inputs import LinearInputs
from bench.peers._packages import installed, why_absent
from bench.reference import policy_loss
from bench.shapes import Shape

NAME = "liger scaled ce"
_MODULE = "liger_kernel.ops.fused_linear_scaled_cross_entropy"


def version() -> str | None:
    return installed("liger-kernel")


def unavailable(device: torch.device) -> str | None:
    reason = why_absent("liger-kernel", _MODULE)
    if reason is None and device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0):
        return why_absent("nvidia-cutlass-dsl", "cutlass.cute")
    return reason


def prepare(case: Case, shape: Shape) -> Run:
    if case.family != "linear":
        raise Unsupported("it has no counterpart.")
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import LigerFusedLinearScaledCrossEntropyFunction

    def logprobs(inputs: LinearInputs) -> Tensor:
        return -LigerFusedLinearScaledCrossEntropyFunction.apply(inputs.hidden, inputs.head, inputs.targets)

    def with_entropy(inputs: LinearInputs) -> tuple[Tensor, Tensor]:
        arguments = inputs.hidden, inputs.head, inputs.targets, 1.0, -100, 1, True
        nll, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(*arguments)
        return -nll, entropy

    if case.op == "linear_ppo_loss":
        return by_autograd(case, lambda inputs: policy_loss(logprobs(inputs), inputs, inputs.denominator))
    return by_autograd(case, with_entropy if case.entropy else logprobs)

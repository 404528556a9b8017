"""The plain-torch bodies of the ops that also exist in C++: says where the C++ is worth having.

Only meaningful on the CPU, and only where the C++ was built: there `airl` is the C++ and this is the same op
without it.
"""

import torch
from airl_kernels import native, returns, token_head

from bench.cases import Case, Result, Run, Unsupported
from bench.inputs import GAMMA, LABEL_SMOOTHING, LAMBDA, HeadInputs, SequenceInputs
from bench.shapes import Shape

NAME = "airl plain torch"


def version() -> str | None:
    return None


def unavailable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return "it is compared with the C++ ops, which exist for the CPU only."
    status = native.status()
    return None if status.available else f"airl runs this very code, as the C++ ops are absent: {status.reason}"


def _token_rewards(inputs: HeadInputs) -> Result:
    head = inputs.hidden, inputs.weight, inputs.bias, inputs.index, None
    return Result(outputs=(token_head.token_rewards_reference(*head, "logit", 1.0, None),), gradients=())


def _discriminator_loss(inputs: HeadInputs) -> Result:
    with torch.no_grad():
        loss, _, *gradients, _ = token_head.discriminator_loss_reference(
            inputs.hidden, inputs.weight, inputs.bias, inputs.targets, inputs.weights, inputs.index, None, None, None,
            "bce", LABEL_SMOOTHING, 1.0, True, True,
        )  # fmt: skip
    return Result(outputs=(loss,), gradients=tuple(gradients))


def _discounted_returns(inputs: SequenceInputs) -> Result:
    mask = None if inputs.mask is None else inputs.mask.view(-1)
    flat = returns.discounted_returns_reference(inputs.rewards.view(-1), inputs.cu_seqlens, mask, GAMMA, False)
    return Result(outputs=(flat.view(inputs.rewards.shape),), gradients=())


def _group_advantages(inputs: SequenceInputs) -> Result:
    settings = inputs.cu_seqlens, inputs.group, GAMMA, "last_token", 1e-6, 0.0
    flat = returns.group_advantages_reference(inputs.rewards.view(-1), *settings)
    return Result(outputs=(flat.view(inputs.rewards.shape),), gradients=())


def _gae(inputs: SequenceInputs) -> Result:
    mask = None if inputs.mask is None else inputs.mask.view(-1)
    columns = inputs.rewards.view(-1), inputs.values.view(-1)
    both = returns.gae_reference(*columns, inputs.cu_seqlens, mask, GAMMA, LAMBDA)
    return Result(outputs=tuple(flat.view(inputs.rewards.shape) for flat in both), gradients=())


_FUNCTIONS = {
    "token_rewards": _token_rewards,
    "discriminator_loss": _discriminator_loss,
    "discounted_returns": _discounted_returns,
    "group_advantages": _group_advantages,
    "gae": _gae,
}


def prepare(case: Case, shape: Shape) -> Run:
    if case.op not in _FUNCTIONS:
        raise Unsupported("there is no C++ version to compare with.")
    return _FUNCTIONS[case.op]

"""Ours, through the public functions of airl_kernels: Triton on CUDA, C++ or plain torch on the CPU."""

import airl_kernels as ak
import torch
from torch import Tensor

from bench.cases import Case, Run, by_autograd
from bench.inputs import CLIP, GAMMA, LABEL_SMOOTHING, LAMBDA, HeadInputs, LinearInputs, LogitInputs, SequenceInputs
from bench.peers._packages import installed
from bench.shapes import Shape

NAME = "airl"


def version() -> str | None:
    return installed("airl-kernels")


def unavailable(device: torch.device) -> str | None:
    return None


def _token_rewards(inputs: HeadInputs) -> Tensor:
    return ak.token_rewards(inputs.hidden, inputs.weight, inputs.bias, index=inputs.index)


def _discriminator_loss(inputs: HeadInputs) -> Tensor:
    head = inputs.hidden, inputs.weight, inputs.bias
    loss, _ = ak.discriminator_loss(
        *head, inputs.targets, inputs.weights, index=inputs.index, label_smoothing=LABEL_SMOOTHING
    )
    return loss


def _discounted_returns(inputs: SequenceInputs) -> Tensor:
    if inputs.mask is None:
        return ak.discounted_returns(inputs.rewards.view(-1), GAMMA, inputs.cu_seqlens).view(inputs.rewards.shape)
    return ak.discounted_returns(inputs.rewards, GAMMA, mask=inputs.mask)


def _group_advantages(inputs: SequenceInputs) -> Tensor:
    flat = inputs.rewards.view(-1)
    return ak.group_advantages(flat, inputs.cu_seqlens, inputs.group, GAMMA).view(inputs.rewards.shape)


def _gae(inputs: SequenceInputs) -> tuple[Tensor, Tensor]:
    return ak.gae(inputs.rewards, inputs.values, GAMMA, LAMBDA, mask=inputs.mask)


def _ppo_loss(inputs: SequenceInputs) -> Tensor:
    mask = None if inputs.mask is None else inputs.mask.view(-1)
    columns = (t.view(-1) for t in (inputs.logprobs, inputs.old_logprobs, inputs.advantages))
    return ak.ppo_loss(*columns, mask, clip_low=CLIP, clip_high=CLIP)[0]


def _policy_arguments(inputs: LinearInputs | LogitInputs) -> dict[str, object]:
    return {"clip_low": CLIP, "clip_high": CLIP, "denominator": inputs.denominator}


def _linear_ppo_loss(inputs: LinearInputs) -> Tensor:
    loss, _ = ak.linear_ppo_loss(
        inputs.hidden, inputs.weight, inputs.targets, inputs.old_logprobs, inputs.advantages, inputs.mask,
        entropy=False, num_tokens=inputs.vocabulary, **_policy_arguments(inputs),
    )  # fmt: skip
    return loss


def prepare(case: Case, shape: Shape) -> Run:
    def selective(inputs: LogitInputs) -> Tensor:
        # A gradient may overwrite logits only where they are no leaf; in a model they never are.
        logits = inputs.logits.view_as(inputs.logits) if case.inplace else inputs.logits
        return ak.selective_log_softmax(logits, inputs.targets, inplace_backward=case.inplace)

    def loss_from_logits(inputs: LogitInputs) -> Tensor:
        per_token = inputs.old_logprobs, inputs.advantages, inputs.mask
        return ak.ppo_loss(selective(inputs), *per_token, **_policy_arguments(inputs))[0]

    def linear_logprob(inputs: LinearInputs) -> Tensor | tuple[Tensor, Tensor]:
        layout = {"num_tokens": inputs.vocabulary, "entropy": case.entropy}
        return ak.linear_logprob(inputs.hidden, inputs.weight, inputs.targets, **layout)

    functions = {
        "token_rewards": _token_rewards,
        "discriminator_loss": _discriminator_loss,
        "discounted_returns": _discounted_returns,
        "group_advantages": _group_advantages,
        "gae": _gae,
        "ppo_loss": _ppo_loss if case.family == "sequences" else loss_from_logits,
        "selective_log_softmax": selective,
        "linear_logprob": linear_logprob,
        "linear_ppo_loss": _linear_ppo_loss,
    }
    return by_autograd(case, functions[case.op])

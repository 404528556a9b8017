"""Liger-Kernel: the fused linear GRPO loss, and the Triton GRPO loss from given logits."""

import torch
from torch import Tensor

from bench.cases import Case, Run, Unsupported, by_autograd
from bench.inputs import CLIP, LinearInputs, LogitInputs
from bench.peers._packages import installed, why_absent
from bench.shapes import Shape

NAME = "liger"


def version() -> str | None:
    return installed("liger-kernel")


def unavailable(device: torch.device) -> str | None:
    return why_absent("liger-kernel", "liger_kernel.chunked_loss")


def prepare(case: Case, shape: Shape) -> Run:
    if case.op == "linear_ppo_loss":
        return by_autograd(case, _linear())
    if case.op == "ppo_loss" and case.family == "logits":
        return by_autograd(case, _from_logits())
    raise Unsupported("it has no differentiable counterpart.")


def _linear():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # Its default chunk, one sequence. It compiles the loss of given log-probabilities only; not on the CPU, where
    # compiling would take longer than the measurement.
    compiled = torch.cuda.is_available()
    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="dapo"
    )

    def loss(inputs: LinearInputs) -> Tensor:
        rows = inputs.sequences, -1
        return module(
            inputs.hidden.view(*rows, inputs.hidden.shape[1]), inputs.head, inputs.targets.view(rows),
            inputs.mask.view(rows).float(), inputs.advantages.view(rows)[:, 0].contiguous(),
            old_per_token_logps=inputs.old_logprobs.view(rows),
        )[0]  # fmt: skip

    return loss


def _from_logits():
    if not torch.cuda.is_available():
        raise Unsupported("its Triton GRPO loss needs CUDA.")
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(inputs: LogitInputs) -> Tensor:
        value, _ = triton_grpo_loss(
            _WithSparePosition.apply(inputs.logits), inputs.old_logprobs[None], None, inputs.targets[None],
            inputs.advantages[:1], inputs.mask[None].int(), temperature=1.0, beta=0.0, eps_low=CLIP, eps_high=CLIP,
            inplace=True, loss_type="dapo", reduce=True,
        )  # fmt: skip
        return value

    return loss


class _WithSparePosition(torch.autograd.Function):
    """[N, V] -> [1, N+1, V] without a copy where the buffer has the row; the loss scores all positions but the last."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        rows, vocabulary = logits.shape
        if logits.untyped_storage().nbytes() >= (rows + 1) * vocabulary * logits.itemsize:
            return logits.as_strided((1, rows + 1, vocabulary), (logits.numel() + vocabulary, vocabulary, 1))
        return torch.cat((logits, logits.new_zeros(1, vocabulary)))[None]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient[0, :-1]

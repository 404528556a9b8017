"""What is measured: one `Case` per op and way of using it, and what a backend must answer.

A backend is a module of `bench/peers` with
    NAME                     as printed
    version() -> str | None  of the package, None when it is absent
    unavailable(device)      one sentence why it cannot run there, or None
    prepare(case, shape)     a function from the case's inputs to a `Result`; raises `Unsupported` with a reason
and, where they apply,
    HOLDS_LOGITS = True      it makes all [N, V] logits at once, and is skipped where they do not fit
    TOLERANCE                how inexact it is by design (`verify.py`)
    COMPILES_FOR_A_SHAPE = True     seconds each: it is verified at full size alone
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from bench.inputs import Inputs
from bench.shapes import Shape


class Unsupported(Exception):
    """Why a backend does not take part in a case; printed beside the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """op: a function of airl_kernels. mode: how it is used, as printed. family: of the shapes it runs at.

    backward: gradients are part of the measurement. train_weight, entropy, inplace, index: options of the ops.
    rank: 0 for the cases with a target, which run first; the higher, the sooner a time budget leaves it out.
    """

    op: str
    mode: str
    family: str
    rank: int
    backward: bool = False
    train_weight: bool = False
    entropy: bool = False
    inplace: bool = False
    index: bool = False

    def runs_at(self, shape: Shape) -> bool:
        """A group's advantages need other sequences to compare with."""
        return shape.family == self.family and not (self.op == "group_advantages" and shape.sequences == 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """outputs: what the op returns. gradients: of the inputs' leaves, in their order; none without backward."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


Run = Callable[[Inputs], Result]
Backend = ModuleType

CASES = (
    Case(op="linear_logprob", mode="frozen f+b", family="linear", rank=0, backward=True),
    Case(op="linear_ppo_loss", mode="trainable f+b", family="linear", rank=0, backward=True, train_weight=True),
    Case(op="discriminator_loss", mode="f+b", family="head", rank=0, backward=True, train_weight=True),
    Case(op="discounted_returns", mode="forward", family="sequences", rank=0),
    Case(op="selective_log_softmax", mode="f+b in place", family="logits", rank=0, backward=True, inplace=True),
    Case(op="linear_ppo_loss", mode="frozen f+b", family="linear", rank=1, backward=True),
    Case(op="linear_logprob", mode="trainable f+b", family="linear", rank=1, backward=True, train_weight=True),
    Case(op="linear_logprob", mode="no_grad", family="linear", rank=1),
    Case(op="linear_logprob", mode="no_grad, entropy", family="linear", rank=2, entropy=True),
    Case(op="token_rewards", mode="forward", family="head", rank=1),
    Case(
        op="discriminator_loss", mode="index f+b", family="head", rank=1, backward=True, train_weight=True, index=True
    ),
    Case(op="group_advantages", mode="forward", family="sequences", rank=1),
    Case(op="gae", mode="forward", family="sequences", rank=1),
    Case(op="ppo_loss", mode="f+b", family="sequences", rank=1, backward=True),
    Case(op="ppo_loss", mode="from logits f+b", family="logits", rank=1, backward=True, inplace=True),
    Case(op="selective_log_softmax", mode="forward", family="logits", rank=1),
    Case(op="selective_log_softmax", mode="f+b", family="logits", rank=1, backward=True),
)
OPS = tuple(dict.fromkeys(case.op for case in CASES))


def by_autograd(case: Case, forward: Callable[[Inputs], Tensor | tuple[Tensor, ...]]) -> Run:
    """A `Run` of a differentiable function, whose first output is differentiated."""

    def run(inputs: Inputs) -> Result:
        with torch.set_grad_enabled(case.backward):
            outputs = forward(inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not case.backward:
            return Result(outputs=outputs, gradients=())
        upstream = inputs.upstream.to(outputs[0].dtype) if outputs[0].dim() else None
        gradients = torch.autograd.grad(outputs[0], inputs.leaves, upstream)
        return Result(outputs=tuple(output.detach() for output in outputs), gradients=gradients)

    return run

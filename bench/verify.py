"""A backend is right before it is timed: values and gradients against the plain version in float64.

Twice: the whole result of a problem of at most 256 tokens, and some rows of the result at full size, where offsets
no longer fit into 32 bits. Sequences are compared whole.
The budget of ours is twice the error of the plain version in the same precision, whose matrix products err as much as
any order of adding their terms may (`airl_kernels.testing.rounding`): not as the library's kernel for that shape on
this machine happens to. That of peers is eight times, since some round more often by design. A few units of rounding
are added, as one number's error is luck.
"""

import math
from dataclasses import dataclass, replace

import torch
from airl_kernels.testing import WorstProducts
from torch import Tensor

from bench import reference
from bench.cases import Case, Result, Run, by_autograd
from bench.inputs import GAMMA, LAMBDA, Inputs, SequenceInputs, make_inputs
from bench.shapes import Shape

ROWS, SAMPLED_ROWS = 256, 32
_FACTOR = {True: 2.0, False: 8.0}  # ours, peers
_LOSS_SCALE = 0.1  # magnitude of the terms that a loss is the sum of, at least
_SLOWEST_STEPS = 20_000  # sequences longer than this are summed in Python's floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """error: root mean square error over the root mean square of the exact values. budget: its bound.

    what: which result this is.
    """

    error: float
    budget: float
    what: str

    @property
    def passed(self) -> bool:
        return self.error <= self.budget  # False for NaN


class Yardstick:
    """The exact results of one problem, made once for all its backends."""

    def __init__(self, case: Case, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
        self.case, self.shape, self.dtype, self.device = case, shape, dtype, device
        self.small = make_inputs(case, shape.with_tokens(ROWS), dtype, device, seed=1)
        self.exact, self.careful = exact(case, self.small), careful(case, self.small)
        self.sampled: tuple[Tensor, Result, Result] | None = None
        if shape.tokens > ROWS and shape.family != "sequences":
            rows = torch.linspace(0, shape.tokens - 1, SAMPLED_ROWS, device=device).long()
            sample = make_inputs(case, shape, dtype, device).take(rows)
            self.sampled = rows, *(per_row(result, rows) for result in (exact(case, sample), careful(case, sample)))

    def check(self, run: Run, full: Inputs, *, ours: bool, tolerance: float = 0.0, one_shape: bool = False) -> Check:
        """full: the inputs at full size of seed 0; an op that works in place overwrites them.

        tolerance: added to the budget, for a peer that is inexact by design. one_shape: at full size alone, where its
        rows can be compared, for a peer that compiles for every shape.
        """
        checks = []
        if self.sampled is None or not one_shape:
            checks += compare(run(self.small.clone()), self.exact, self.careful, self.dtype, ours)
        if self.sampled is not None:
            rows, true, plain = self.sampled
            checks += compare(per_row(run(full), rows), true, plain, self.dtype, ours, "sampled rows of ")
        return worst([replace(check, budget=check.budget + tolerance) for check in checks])


def worst(checks: list[Check]) -> Check:
    """The one nearest to, or furthest beyond, its bound."""
    return max(checks, key=lambda check: math.inf if math.isnan(check.error) else check.error / check.budget)


def per_row(result: Result, rows: Tensor) -> Result:
    """What has one entry per token, at the rows: outputs [N] and the gradient of hidden states or logits."""

    def pick(t: Tensor) -> Tensor:
        return t if t.shape[0] == rows.numel() else t[rows]  # the references hold these rows alone

    outputs, gradients = [t for t in result.outputs if t.dim()], result.gradients[:1]
    return Result(outputs=tuple(map(pick, outputs)), gradients=tuple(map(pick, gradients)))


def exact(case: Case, inputs: Inputs) -> Result:
    if isinstance(inputs, SequenceInputs) and case.op != "ppo_loss":
        inputs = inputs.mapped(lambda t: t.cpu())
        if inputs.rewards.shape[1] > _SLOWEST_STEPS:
            return _one_step_at_a_time(case, inputs)
    return by_autograd(case, reference.forward_of(case))(inputs.double())


def careful(case: Case, inputs: Inputs) -> Result | None:
    """The plain version in the precision of the inputs, with products in their worst order.

    None where it would be slow and rounding alone is allowed.
    """
    if isinstance(inputs, SequenceInputs) and case.op != "ppo_loss":
        return None
    with WorstProducts():
        return by_autograd(case, reference.forward_of(case))(inputs)


def _one_step_at_a_time(case: Case, inputs: SequenceInputs) -> Result:
    """Returns, or GAE, of few long sequences without padding, in Python's floats, which are float64."""
    decay = GAMMA if case.op == "discounted_returns" else GAMMA * LAMBDA
    rows = []
    for rewards, values in zip(inputs.rewards.tolist(), inputs.values.tolist(), strict=True):
        if case.op == "gae":
            following = [*values[1:], 0.0]
            rewards = [r + GAMMA * n - v for r, n, v in zip(rewards, following, values, strict=True)]
        running, sums = 0.0, []
        for reward in reversed(rewards):
            running = reward + decay * running
            sums.append(running)
        rows.append(sums[::-1])
    result = torch.tensor(rows, dtype=torch.float64)
    return Result(outputs=(result,) if case.op != "gae" else (result, result + inputs.values), gradients=())


def compare(
    result: Result, true: Result, plain: Result | None, dtype: torch.dtype, ours: bool, where: str = ""
) -> list[Check]:
    """One check per output and gradient."""
    checks = []
    for kind in ("output", "gradient"):
        mine, exact_ones = getattr(result, f"{kind}s"), getattr(true, f"{kind}s")
        plain_ones = getattr(plain, f"{kind}s") if plain is not None else (None,) * len(exact_ones)
        if len(mine) != len(exact_ones):
            return [Check(error=math.inf, budget=1.0, what=f"{len(mine)} {kind}s, expected {len(exact_ones)}")]
        for number, (value, right, yardstick) in enumerate(zip(mine, exact_ones, plain_ones, strict=True)):
            allowed = slack(right, dtype)
            if yardstick is not None:
                allowed += _FACTOR[ours] * error_of(yardstick, right)
            checks.append(Check(error=error_of(value, right), budget=allowed, what=f"{where}{kind} {number}"))
    return checks


def slack(right: Tensor, dtype: torch.dtype) -> float:
    """Units of rounding: more for a single number, a sum that depends on its order."""
    eps = torch.finfo(dtype).eps
    if right.numel() == 1:
        return (64 if dtype == torch.float32 else 4) * eps
    return 16 * torch.finfo(torch.float32).eps + (0.5 * eps if dtype != torch.float32 else 0.0)


def error_of(value: Tensor, right: Tensor) -> float:
    """Root mean square error over the root mean square of the exact values; infinite for a wrong shape."""
    if value.shape != right.shape:
        return math.inf
    right = right.detach()
    scale = right.square().mean().sqrt().clamp(min=_LOSS_SCALE if right.numel() == 1 else 1e-12)
    difference = value.detach().to(right.device, torch.float64) - right
    return (difference.square().mean().sqrt() / scale).item()

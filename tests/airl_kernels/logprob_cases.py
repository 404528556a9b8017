"""Inputs, float64 references and measures shared by the tests of log-probabilities and policy losses.

The references are written from the papers' formulas with autograd; they share no code with the library.
With TRITON_INTERPRET=1 the ops on CPU tensors run the Triton kernels through their launchers, so that every test
of these files is a test of the kernels as well; `test_logprob_interpreted.py` starts such a run.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter computes in numpy, which has no bfloat16 of its own; the kernels' bf16 is covered by compilation.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]


def use_triton_on_the_cpu() -> None:
    """Make the ops under test run their Triton launchers on CPU tensors (for float32 and below)."""
    from airl_kernels import (
        _rows,
        _rows_triton,
        linear_policy_loss,
        logprob,
        logprob_triton,
        policy_loss,
        policy_loss_triton,
        selective,
    )

    pairs = (
        (_rows.gather_rows, _rows_triton.gather_rows, _rows.gather_rows_reference),
        (_rows._add_rows, _rows_triton.add_rows, _rows.add_rows_reference),
        (logprob._linear_logprob, logprob_triton.linear_logprob, logprob.linear_logprob_reference),
        (logprob._linear_logprob_backward, logprob_triton.linear_logprob_backward,
         logprob.linear_logprob_backward_reference),
        (logprob.scaled, logprob_triton.scale_rows, logprob.scale_rows_reference),
        (selective._selective, logprob_triton.selective_log_softmax, selective.selective_log_softmax_reference),
        (selective._selective_backward_, logprob_triton.selective_log_softmax_backward_,
         selective.selective_log_softmax_backward__reference),
        (policy_loss._ppo_loss, policy_loss_triton.ppo_loss, policy_loss.ppo_loss_reference),
        (linear_policy_loss._linear_ppo_loss, policy_loss_triton.linear_ppo_loss,
         linear_policy_loss.linear_ppo_loss_reference),
    )  # fmt: skip
    for op, launcher, reference in pairs:

        def kernel(*args, launcher=launcher, reference=reference):
            wide = any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
            return reference(*args) if wide else launcher(*args)

        op.register_kernel("cpu")(kernel)


if INTERPRETED:
    use_triton_on_the_cpu()


# ---- inputs ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """hidden [N, H], weight [V, H], bias [V] or None, targets [N]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None and t.requires_grad]


def head(
    rows: int, width: int, vocab: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", bias: bool = False,
    frozen: bool = False, seed: int = 0, spread: float = 2.0,
) -> Head:  # fmt: skip
    """Random inputs whose logits have a standard deviation of about `spread`."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=make) * spread
    weight = torch.randn(vocab, width, generator=make) / width**0.5
    offsets = torch.randn(vocab, generator=make) if bias else None
    targets = torch.randint(vocab, (rows,), generator=make)
    if rows > 1:
        targets[:2] = torch.tensor([0, vocab - 1])
    place = {"dtype": dtype, "device": device}
    return Head(
        hidden.to(**place).requires_grad_(),
        weight.to(**place).requires_grad_(not frozen),
        None if offsets is None else offsets.to(**place).requires_grad_(not frozen),
        targets.to(device),
    )


def wide(inputs: Head) -> Head:
    """The same numbers in float64, on the CPU, with leaves of their own."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().cpu().double().requires_grad_(tensor.requires_grad)

    return Head(copy(inputs.hidden), copy(inputs.weight), copy(inputs.bias), inputs.targets.cpu())


# ---- references ------------------------------------------------------------------------------------------------


def plain_log_softmax(
    inputs: Head, temperature: float = 1.0, softcap: float | None = None, logit_scale: float = 1.0
) -> Tensor:
    """log softmax [N, V]: products in the inputs' type, everything after in at least float32."""
    logits = inputs.hidden @ inputs.weight.T
    if inputs.bias is not None:
        logits = logits + inputs.bias
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits / temperature, dim=-1)


def plain_logprob(inputs: Head, **options: float) -> tuple[Tensor, Tensor]:
    """(log-probabilities, entropies) with autograd."""
    logp = plain_log_softmax(inputs, **options)
    p = logp.exp()
    entropy = -(p * torch.where(p > 0, logp, 0.0)).sum(-1)
    return logp.gather(1, inputs.targets[:, None])[:, 0], entropy


# ---- measures --------------------------------------------------------------------------------------------------


def rms_error(value: Tensor, truth: Tensor) -> float:
    return (value.detach().cpu().double() - truth.detach()).square().mean().sqrt().item()


def assert_as_good_as(ours: Tensor, careful: Tensor, truth: Tensor, what: str, scale: float = 0.0) -> None:
    """Our error is at most twice that of careful torch, allowing for the last bit of the result's type.

    scale: size of the terms the result is a sum of, where they may cancel.
    """
    assert ours.dtype == careful.dtype or ours.dtype == torch.float32, what
    last_bit = torch.finfo(ours.dtype).eps * max(scale, truth.detach().abs().max().item())
    error, budget = rms_error(ours, truth), 2.0 * rms_error(careful, truth) + last_bit
    assert error <= budget, f"{what}: error {error:.3g}, budget {budget:.3g}"


def products(run: Callable[[], object]) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product that `run` computes, inside custom ops too."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        run()
    found = []
    for event in record.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
            matrices = [shape for shape in event.input_shapes if len(shape) >= 2]
            left, right = matrices[1:3] if "add" in event.name and len(event.input_shapes[0]) == 2 else matrices[:2]
            found.append((left[-2], left[-1], right[-1]))
    return found


def product_count(run: Callable[[], object], rows: int, width: int, vocab: int) -> float:
    """The work of all products in units of one rows x width x vocab product."""
    return sum(m * k * n for m, k, n in products(run)) / (rows * width * vocab)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes of tensors alive at once during `run`, beyond what was alive before, on the CPU."""
    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    alive = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    del kept
    return peak

"""How wrong a kernel may be, how many products it may compute, and how much memory it may take.

The budget of an error is relative: at most twice that of careful torch in the same type, both against float64. Where
matrix products take part, `careful` comes from `rounding.in_the_worst_order`: the error that any order of their sums
may have, not that of the order which this processor's library chose. It then has one more dimension, the runs, first.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Units of rounding beyond twice the error of careful torch. The interpreter adds in numpy's order, not a GPU's, and
# runs fewer seeds: there the tests are of the kernels' logic.
_SLACK = 16 if INTERPRETED else 0.5


# ---- errors ----------------------------------------------------------------------------------------------------


def errors(value: Tensor, exact: Tensor, floor: float = 1e-3) -> tuple[float, float]:
    """(root mean square, largest) error as a fraction of the largest exact magnitude, or of `floor` if it vanishes.

    value: of the shape of `exact`, or several of them stacked.
    """
    if not exact.numel():
        return 0.0, 0.0
    scale = float(exact.detach().abs().max().clamp(min=floor))
    difference = (value.detach().double() - exact.detach()) / scale
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def assert_as_careful(ours: Tensor, careful: Tensor, exact: Tensor, floor: float = 1e-3, slack: float = _SLACK) -> None:
    """Our root mean square error is at most twice that of careful torch in the same precision, or rounding itself.

    The largest error, which a single number decides, may be four times that of careful torch.
    careful: a result, or results of several runs stacked in a first dimension.
    slack: units of rounding of the largest exact magnitude (or of `floor`) that either may have beyond that.
    """
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    mine, theirs = errors(ours, exact, floor), errors(careful, exact, floor)
    slack = slack * torch.finfo(ours.dtype).eps
    assert mine[0] <= 2 * theirs[0] + slack, (mine, theirs)
    assert mine[1] <= 4 * theirs[1] + slack, (mine, theirs)


def assert_all_as_careful(runs: list[list[tuple[Tensor, ...]]], terms: float = 0.1) -> None:
    """`assert_as_careful` output by output, over several runs together: one number's rounding error is luck.

    runs: for each seed [ours, careful, exact], each a tuple of the same outputs; careful ones from
    `in_the_worst_order`. Single numbers are sums that may cancel; terms: what the magnitudes of their terms add up to
    at least.
    """
    for output in range(len(runs[0][0])):
        floor = terms if runs[0][0][output].numel() == 1 else 1e-3
        ours, careful, exact = ([run[who][output] for run in runs] for who in range(3))
        assert [t.shape for t in ours] == [t.shape for t in exact]
        assert_as_careful(
            torch.cat([t.reshape(-1) for t in ours]),
            torch.cat([t.reshape(t.shape[0], -1) for t in careful], 1),
            torch.cat([t.reshape(-1) for t in exact]),
            floor,
        )


def rms_error(value: Tensor, truth: Tensor) -> float:
    """Root mean square error, absolute; value: of the shape of `truth`, or several of them stacked."""
    return (value.detach().to(truth.device).double() - truth.detach()).square().mean().sqrt().item()


def assert_as_good_as(ours: Tensor, careful: Tensor, truth: Tensor, what: str, scale: float = 0.0) -> None:
    """Our error is at most twice that of careful torch, allowing for the last bit of the result's type.

    careful: a result, or results of several runs stacked in a first dimension.
    scale: size of the terms the result is a sum of, where they may cancel.
    """
    assert ours.shape == truth.shape, (what, ours.shape, truth.shape)
    assert ours.dtype == careful.dtype or ours.dtype == torch.float32, what
    last_bit = torch.finfo(ours.dtype).eps * max(scale, truth.detach().abs().max().item())
    error, budget = rms_error(ours, truth), 2.0 * rms_error(careful, truth) + last_bit
    assert error <= budget, f"{what}: error {error:.3g}, budget {budget:.3g}"


# ---- products --------------------------------------------------------------------------------------------------


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


# ---- memory ----------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors alive at once during `run`, beyond what was alive before. `run` runs twice."""
    run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = run()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    alive = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    del kept
    return peak

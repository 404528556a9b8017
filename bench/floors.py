"""What this machine can do: a large copy, or a matrix product by cuBLAS or MKL.

Timed in turns with the backends of every problem, so that a machine that slows down lowers the floor as well.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.costs import Cost
from bench.inputs import Inputs, LinearInputs

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}
_MOST_ROWS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """name: of the rate, with its unit. call: does `work`, in 10^9 bytes (read and written) or 10^12 operations."""

    name: str
    call: Callable[[int], object]
    work: float

    def rate(self, ms: float) -> float:
        """GB/s or TFLOP/s."""
        return 1e3 * self.work / ms

    def floor_ms(self, cost: Cost, ms: float) -> float:
        """How long the op's bytes, or operations, take at the rate of this probe, whose call took `ms`."""
        needed = cost.flops / 1e12 if cost.bound == "gemm" else cost.bytes / 1e9
        return ms * needed / self.work


def probe_for(cost: Cost, inputs: Inputs, device: torch.device) -> Probe:
    """The product of the problem's own hidden states (at most 4096) and weight, or a copy beyond any cache."""
    if cost.bound == "gemm" and isinstance(inputs, LinearInputs):
        hidden, columns = inputs.hidden.detach()[:_MOST_ROWS], inputs.head.detach().t()
        # Rows of whole cache lines: cuBLAS writes rows that are not aligned by its slower kernels.
        out = hidden.new_empty(hidden.shape[0], -(-columns.shape[1] // 64) * 64)[:, : columns.shape[1]]
        sizes = f"{hidden.shape[0]}x{hidden.shape[1]}x{columns.shape[1]}"
        return Probe(
            name=f"gemm {sizes} TFLOP/s",
            call=lambda _: torch.mm(hidden, columns, out=out),
            work=2 * hidden.numel() * columns.shape[1] / 1e12,
        )
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return Probe(name="copy GB/s", call=lambda _: target.copy_(source), work=2 * source.numel() * 4 / 1e9)

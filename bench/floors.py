"""What this machine can do, measured in the same run as the ops: a large copy, and matrix products by cuBLAS or MKL."""

import functools
from dataclasses import dataclass, field

import torch

from bench.costs import Cost
from bench.shapes import Shape
from bench.timing import median_ms

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 128 << 20}


@dataclass(slots=True)
class Floors:
    """Rates measured on first use and kept. rates: name -> GB/s or TFLOP/s, for the report."""

    device: torch.device
    rates: dict[str, float] = field(default_factory=dict)

    def copy_rate(self) -> float:
        """GB/s (10^9 bytes), read and written bytes together."""
        return self._rate("copy GB/s", lambda: copy_rate(self.device))

    def gemm_rate(self, shape: Shape, dtype: torch.dtype) -> float:
        """TFLOP/s of hidden [N, H] times weight.T [H, V], N at most 4096."""
        sizes = min(shape.tokens, 4096), shape.size("hidden"), shape.size("vocabulary")
        name = f"gemm {'x'.join(map(str, sizes))} {str(dtype).removeprefix('torch.')} TFLOP/s"
        return self._rate(name, lambda: gemm_rate(*sizes, dtype, self.device))

    def floor_ms(self, cost: Cost, shape: Shape, dtype: torch.dtype) -> float:
        """The time of that many operations, or bytes, at the rate measured here."""
        if cost.bound == "gemm":
            return cost.flops / self.gemm_rate(shape, dtype) / 1e9
        return cost.bytes / self.copy_rate() / 1e6

    def _rate(self, name: str, measure) -> float:
        if name not in self.rates:
            self.rates[name] = measure()
        return self.rates[name]


def copy_rate(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    ms = median_ms(lambda: target.copy_(source), device)
    return 2 * source.numel() * 4 / ms / 1e6


def gemm_rate(rows: int, width: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> float:
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(vocabulary, width, device=device, dtype=dtype)
    out = torch.empty(rows, vocabulary, dtype=dtype, device=device)
    ms = median_ms(functools.partial(torch.mm, hidden, weight.t(), out=out), device)
    return 2 * rows * width * vocabulary / ms / 1e9

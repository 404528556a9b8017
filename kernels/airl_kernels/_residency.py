"""How many programs of a kernel a multiprocessor holds at once, from what the compiler made of it.

A kernel whose programs walk over the data wants exactly as many as fit: with fewer a part of the chip idles, with more
the last ones run alone. How many fit follows from registers and shared memory, and those change with the version of
Triton, with types and with shapes; a number written down beside the kernel goes stale.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ._common import num_multiprocessors

_WHERE_NOTHING_RUNS = 2  # programs a multiprocessor under the interpreter, and of a cross-compiled launch


@dataclass(frozen=True, slots=True, kw_only=True)
class Multiprocessor:
    """Its limits (CUDA C++ programming guide, table of compute capabilities). shared: bytes, with the reserved ones."""

    shared: int
    registers: int = 65536
    warps: int = 64
    programs: int = 32
    shared_reserved: int = 1024  # for every program

    def resident(self, num_warps: int, registers: int, shared: int) -> int:
        """Programs that fit. registers: a thread, handed out to warps in units of 256; shared: bytes a program."""
        registers_per_warp = -(-registers * 32 // 256) * 256
        by_registers = self.registers // (registers_per_warp * num_warps)
        by_shared = self.shared // (shared + self.shared_reserved)
        return min(by_registers, by_shared, self.warps // num_warps, self.programs)


@functools.cache
def _multiprocessor(device: torch.device) -> Multiprocessor:
    properties = torch.cuda.get_device_properties(device)
    return Multiprocessor(
        shared=properties.shared_memory_per_multiprocessor,
        warps=properties.max_threads_per_multi_processor // properties.warp_size,
    )


_found: dict[tuple, int] = {}


def resident_programs(
    kernel: object, arguments: Sequence[object], options: Mapping[str, object], device: torch.device
) -> int:
    """Programs of `kernel` that the whole device holds when launched with these arguments and options.

    Compiles the kernel, for pointers on whole vectors as allocations are, the first time it meets these types,
    options and divisibilities; looks it up afterwards. Never waits for the device. A function of these alone, so that
    sums over programs come out the same however a tensor is aligned.
    """
    if device.type != "cuda":
        return _WHERE_NOTHING_RUNS * num_multiprocessors(device)
    key = (kernel, device, *map(_kind, arguments), *options.items())
    if key not in _found:
        types = [argument.dtype if isinstance(argument, Tensor) else argument for argument in arguments]
        compiled = kernel.warmup(*types, grid=(1,), **options)
        compiled._init_handles()  # loads it; the registers are known from then on
        num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
        fit = max(1, _multiprocessor(device).resident(num_warps, compiled.n_regs, shared))
        _found[key] = fit * num_multiprocessors(device)
    return _found[key]


def _kind(argument: object) -> object:
    """What Triton compiles anew for: the type, and whether a whole number is 1 or a multiple of 16."""
    if isinstance(argument, Tensor):
        return argument.dtype
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0
    return type(argument)

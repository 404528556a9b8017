"""Compile the Triton kernels for a chip this machine does not have, and report what they would use there.

    python -m airl_kernels.cross_compile [--arch 80 90 100] [--family returns] [--only TEXT] [--json]

compiles every kernel through its own launcher, at the shapes each `*_triton.py` lists in `shipped_launches()`, with
tensors on the "meta" device: what is measured is what ships. Needs triton and its bundled ptxas; no GPU.
Must run without TRITON_INTERPRET (the interpreter compiles nothing).
"""

import argparse
import contextlib
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ._residency import Multiprocessor

FAMILIES = ("token_head", "returns", "logprob", "policy_loss", "_rows")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    name: str
    shared_per_block: int
    multiprocessor: Multiprocessor


CHIPS = {
    80: Chip(name="A100", shared_per_block=163 * 1024, multiprocessor=Multiprocessor(shared=164 * 1024)),
    90: Chip(name="H100/H200", shared_per_block=227 * 1024, multiprocessor=Multiprocessor(shared=228 * 1024)),
    100: Chip(name="B200", shared_per_block=227 * 1024, multiprocessor=Multiprocessor(shared=228 * 1024)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelReport:
    """One compiled kernel. registers: per thread. local_bytes: stack and spills per thread. shared_bytes: per block.

    occupancy: resident warps over the chip's maximum, from registers, shared memory and block size alone.
    """

    launch: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    local_bytes: int
    shared_bytes: int
    occupancy: float

    @property
    def problems(self) -> tuple[str, ...]:
        """Why this kernel must not ship on this chip; empty when it may."""
        chip = CHIPS[self.arch]
        found = []
        if self.local_bytes:
            found.append(f"{self.local_bytes} bytes of local memory a thread (register spills)")
        if self.shared_bytes > chip.shared_per_block:
            found.append(f"{self.shared_bytes} bytes of shared memory, {chip.name} has {chip.shared_per_block}")
        return tuple(found)


def occupancy(arch: int, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Resident warps over the most the chip holds."""
    limits = CHIPS[arch].multiprocessor
    return limits.resident(num_warps, registers, shared_bytes) * num_warps / limits.warps


def cross_compile(name: str, call: Callable[[], object], arch: int) -> list[KernelReport]:
    """Every kernel that `call` launches, compiled for `arch` (80, 90, 100) and not run.

    call: runs a launcher on "meta" tensors. Returns one report per distinct compiled kernel, in launch order.
    """
    return [_report(name, kernel, arch) for kernel in compiled_kernels(call, arch)]


def compiled_kernels(call: Callable[[], object], arch: int) -> list:
    """The distinct `triton.compiler.CompiledKernel`s that `call` launches, for reading their `asm`."""
    compiled: dict = {}
    with _compile_only(arch, compiled):
        call()
    return list(compiled.values())


@contextlib.contextmanager
def _compile_only(arch: int, compiled: dict) -> Iterator[None]:
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launch, active = JITFunction.run, driver._active

    def compile_instead(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = kernel
        return kernel

    JITFunction.run = compile_instead
    driver.set_active(AbsentDevice(arch))
    try:
        yield
    finally:
        JITFunction.run = launch
        driver._active = active


class AbsentDevice:
    """What Triton asks its driver for when it compiles. The architecture doubles as the device's number."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self):
        return self._target


def _report(launch: str, kernel, arch: int) -> KernelReport:
    usage = resource_usage(kernel.asm["cubin"])
    meta = kernel.metadata
    return KernelReport(
        launch=launch,
        kernel=kernel.name,
        arch=arch,
        num_warps=meta.num_warps,
        num_stages=meta.num_stages,
        registers=usage["REG"],
        local_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=meta.shared,
        occupancy=occupancy(arch, meta.num_warps, usage["REG"], meta.shared),
    )


@functools.cache
def resource_usage(cubin: bytes) -> dict[str, int]:
    """The numbers of `cuobjdump -res-usage` for a cubin of one kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    if not {"REG", "STACK", "LOCAL"} <= usage.keys():
        raise RuntimeError(f"cuobjdump gave no resource usage: {text.strip()[:200]}")
    return usage


def shipped_launches(families: tuple[str, ...] = FAMILIES) -> dict[str, Callable[[], object]]:
    """Every launch the families declare, by name."""
    launches: dict[str, Callable[[], object]] = {}
    for family in families:
        module = importlib.import_module(f".{family}_triton", __package__)
        launches.update(module.shipped_launches())
    return launches


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=tuple(CHIPS), default=list(CHIPS))
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--only", default="", help="launches whose name contains this")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    options = parser.parse_args(arguments)
    failed = 0
    for name, call in shipped_launches(tuple(options.family)).items():
        if options.only not in name:
            continue
        for arch in options.arch:
            for report in cross_compile(name, call, arch):
                failed += bool(report.problems)
                print(json.dumps(asdict(report)) if options.json else _line(report), flush=True)
    return 1 if failed else 0


def _line(report: KernelReport) -> str:
    return (
        f"sm_{report.arch:<4}{report.launch:<44}{report.kernel:<32}{report.num_warps} warps  "
        f"{report.registers:>3} registers  {report.shared_bytes / 1024:>6.1f} KB shared  "
        f"occupancy {report.occupancy:>4.0%}  {'; '.join(report.problems)}".rstrip()
    )


if __name__ == "__main__":
    sys.exit(main())

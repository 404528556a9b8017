"""Which kernels a program launches, in which specialisations, without compiling or launching any.

Triton asks `knobs.runtime.jit_cache_hook` before it compiles; the hook keeps what `JITFunction.preload` needs to make
the same kernel elsewhere, and says that the matter is settled, upon which the launch does nothing.
"""

import contextlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Self
from unittest.mock import patch

from airl_kernels.cross_compile import AbsentDevice, resource_usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialisation:
    """module, function: where the kernel is defined. data: of `JITFunction.preload`. caller: the first to launch it."""

    module: str
    function: str
    data: str
    caller: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The kernel with what sets this one apart, for people; ":16" marks what is a multiple of 16."""
        given = json.loads(self.data)
        marked = zip(given["attrs_keys"], given["attrs_vals"], strict=True)
        aligned = {key[0] for key, marks in marked if marks}
        types = [
            f"{kind}:16" if place in aligned else str(kind)
            for place, kind in enumerate(given["signature"].values())
            if kind != "constexpr"
        ]
        constants = [str(value) for value in given["constant_vals"] if value is not None]
        return f"{self.function}({', '.join(types)}; {', '.join(constants)}) {given['options']['num_warps']} warps"

    @property
    def weight(self) -> float:
        """About how long it compiles, in no unit: lines of source times the largest tile. 0 for what is not there, as
        in a list of earlier sources; that it does not compile is said when its turn comes."""
        try:
            kernel = getattr(importlib.import_module(self.module), self.function)
        except (ImportError, AttributeError):
            return 0.0
        sizes = [value for value in json.loads(self.data)["constant_vals"] if isinstance(value, int)]
        return len(kernel.src) * (1.0 + max(sizes, default=0) / 4096)


@dataclass(slots=True)
class Recorder:
    """found: distinct specialisations in the order of their first launch. launches: all of them."""

    found: dict[Specialisation, Specialisation] = field(default_factory=dict)
    launches: int = 0
    caller: str = ""

    @contextlib.contextmanager
    def named(self, caller: str) -> Iterator[Self]:
        self.caller, before = caller, self.caller
        try:
            yield self
        finally:
            self.caller = before

    def hook(self, *, fn, compile, is_manual_warmup, **_: object) -> bool:  # the names are Triton's
        entry = Specialisation(
            module=fn.module, function=fn.name, data=_elsewhere(compile["specialization_data"]), caller=self.caller
        )
        self.found.setdefault(entry, entry)
        if is_manual_warmup:
            return False  # the caller wants to look at the compiled kernel, before it launches it
        self.launches += 1
        return True


def _elsewhere(data: str) -> str:
    """Without where this Triton's own device library lies: the Triton that compiles puts in its own, whose content and
    not path is in the key of its cache."""
    given = json.loads(data)
    given["options"].pop("extern_libs", None)
    return json.dumps(given)


@contextlib.contextmanager
def recording(arch: int) -> Iterator[Recorder]:
    """Every launch inside is noted, for a chip of compute capability `arch` / 10, and not made."""
    from triton import knobs

    recorder, before = Recorder(), knobs.runtime.jit_cache_hook
    with absent_device(arch):
        knobs.runtime.jit_cache_hook = recorder.hook
        try:
            yield recorder
        finally:
            knobs.runtime.jit_cache_hook = before


@contextlib.contextmanager
def compiling(arch: int) -> Iterator[list[bool]]:
    """Every launch inside compiles, as a real one does before it launches. Yields one entry per distinct kernel of
    this process: whether Triton's cache on disk had it."""
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        return launch(self, *args, grid=grid, warmup=True, **kwargs)

    with absent_device(arch), cache_hits() as hits, patch.object(JITFunction, "run", compile_only):
        yield hits


@contextlib.contextmanager
def cache_hits() -> Iterator[list[bool]]:
    from triton import knobs

    hits: list[bool] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    try:
        yield hits
    finally:
        knobs.compilation.listener = before


@contextlib.contextmanager
def absent_device(arch: int) -> Iterator[None]:
    """Triton compiles for this chip, whatever is in the machine; a kernel that is asked for its registers knows them
    from its machine code, and is not loaded."""
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver

    def read_registers(kernel: CompiledKernel) -> None:
        kernel.n_regs = resource_usage(kernel.asm["cubin"])["REG"]
        kernel._run = lambda *args: None  # its launch does nothing

    active = driver._active
    driver.set_active(AbsentDevice(arch))
    try:
        with patch.object(CompiledKernel, "_init_handles", read_registers):
            yield
    finally:
        driver._active = active

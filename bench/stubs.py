"""Compile one kernel into Triton's cache, with the C stub that some versions of Triton compile at its first launch."""

import functools
import importlib
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import MagicMock, patch

from bench.recording import Specialisation, absent_device, cache_hits


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """hit: the cache had it. stub_s: seconds of the C compiler. error: why it does not compile, "" when it does."""

    name: str
    seconds: float
    hit: bool
    stub_s: float
    error: str


def compile_one(entry: Specialisation, arch: int) -> Compiled:
    """Whatever goes wrong is a sentence, so that the other kernels go on."""
    start, stub, hits, error = time.perf_counter(), 0.0, [], ""
    try:
        with absent_device(arch), cache_hits() as hits:
            kernel = getattr(importlib.import_module(entry.module), entry.function).preload(entry.data)
    except Exception as problem:  # the compiler raises whatever its parts raise
        lines = [line for line in str(problem).splitlines() if line.strip()] or ["no message"]
        error = f"{type(problem).__name__}: {lines[-1].strip()}"
    seconds = time.perf_counter() - start
    if not error:
        try:
            stub = build_stub(kernel)
        except Exception as problem:
            error = f"its C stub: {type(problem).__name__}: {problem}"
    return Compiled(name=entry.name, seconds=seconds, hit=bool(hits) and all(hits), stub_s=stub, error=error)


def build_stub(kernel) -> float:
    """Seconds; 0 where the stub was there, or where one launcher serves all kernels, as from Triton 3.7 on.

    The stub is linked with libcuda: without a driver, with an empty library of that name, and it is not loaded.
    """
    from triton import knobs
    from triton.backends.nvidia import driver as nvidia

    if not hasattr(nvidia, "make_launcher"):
        return 0.0
    start, built = time.perf_counter(), []
    make = importlib.import_module("triton.runtime.build")._build

    def build(*args, **kwargs):
        built.append(True)
        return make(*args, **kwargs)

    library = knobs.nvidia.libcuda_path if _has_driver() else _empty_libcuda()
    with (
        patch.object(knobs.nvidia, "libcuda_path", library),
        patch("triton.runtime.build._build", build),
        patch("triton.runtime.build._load_module_from_path", lambda name, path: MagicMock()),
    ):
        nvidia.CudaLauncher(kernel.src, kernel.metadata)
    return time.perf_counter() - start if built else 0.0


@functools.cache
def _has_driver() -> bool:
    found = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    return "libcuda.so.1" in found


@functools.cache
def _empty_libcuda() -> str:
    """A folder with a libcuda.so.1 that holds nothing: the real one is bound when the stub is loaded."""
    folder = Path(tempfile.mkdtemp(prefix="empty-libcuda-"))
    command = ["gcc", "-shared", "-x", "c", "/dev/null", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run(command, check=True)
    return str(folder)

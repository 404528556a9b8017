"""How many programs fit on a chip, from a compiled kernel's figures; found once for each kind of call."""

from types import SimpleNamespace

import pytest
import torch
from airl_kernels import _residency
from airl_kernels._residency import Multiprocessor, resident_programs

H100 = Multiprocessor(shared=228 * 1024)
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("num_warps", "registers", "shared", "programs"),
    [
        (4, 147, 16512, 3),  # 152 after rounding: 3.4 times 128 threads of them
        (4, 128, 16512, 4),
        (4, 120, 16512, 4),
        (8, 97, 0, 2),
        (1, 16, 0, 32),  # the limit of programs
        (4, 32, 60 * 1024, 3),  # by shared memory, a kilobyte of it reserved for each program
        (16, 255, 0, 0),  # more than there is
    ],
)
def test_programs_by_hand(num_warps, registers, shared, programs):
    assert H100.resident(num_warps, registers, shared) == programs


class Kernel:
    """Compiles to figures that depend on what the launch is specialised for, as Triton's do."""

    def __init__(self) -> None:
        self.seen = []

    def warmup(self, *arguments, grid, **options):
        self.seen.append((arguments, options))
        compiled = SimpleNamespace(metadata=SimpleNamespace(num_warps=options["num_warps"], shared=16512))

        def load() -> None:
            compiled.n_regs = 147 if torch.float32 in arguments else 120

        compiled._init_handles = load
        return compiled


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_residency, "num_multiprocessors", lambda _: 132)
    monkeypatch.setattr(_residency, "_multiprocessor", lambda _: H100)
    monkeypatch.setattr(_residency, "_found", {})
    return Kernel()


def test_the_grid_follows_the_compiled_kernel(kernel):
    wide, narrow = torch.zeros(4), torch.zeros(4, dtype=torch.bfloat16)
    assert resident_programs(kernel, (wide, None, 32), {"num_warps": 4}, CUDA) == 396
    assert resident_programs(kernel, (narrow, None, 32), {"num_warps": 4}, CUDA) == 528
    assert kernel.seen[0] == ((torch.float32, None, 32), {"num_warps": 4})


def test_compiled_once_for_calls_of_one_kind(kernel):
    options = {"num_warps": 4}
    for rows in (32, 48, 16 * 1000):  # multiples of 16 share a kernel
        for values in (torch.zeros(8), torch.zeros(9)[1:]):  # so do tensors off a whole vector: the grid is the same
            resident_programs(kernel, (values, None, rows, 0.5), options, CUDA)
    assert len(kernel.seen) == 1
    resident_programs(kernel, (torch.zeros(8), None, 33, 0.7), options, CUDA)
    resident_programs(kernel, (torch.zeros(8), None, 35, 0.1), options, CUDA)
    assert len(kernel.seen) == 2
    resident_programs(kernel, (torch.zeros(8), torch.zeros(8), 35, 0.1), options, CUDA)
    resident_programs(kernel, (torch.zeros(8), torch.zeros(8), 35, 0.1), {"num_warps": 8}, CUDA)
    resident_programs(kernel, (torch.zeros(8), torch.zeros(8), 35, None), options, CUDA)
    assert len(kernel.seen) == 5


def test_nothing_is_compiled_where_nothing_runs_on_a_gpu(kernel):
    for device in ("cpu", "meta"):
        assert resident_programs(kernel, (torch.zeros(2),), {"num_warps": 4}, torch.device(device)) == 2 * 132
    assert kernel.seen == []


def test_triton_gives_what_is_asked_of_it():
    """`warmup` takes types for tensors, and what it returns has the attributes that are read."""
    triton = pytest.importorskip("triton")
    import inspect

    from triton.compiler import CompiledKernel

    assert list(inspect.signature(triton.JITFunction.warmup).parameters)[1:] == ["args", "grid", "kwargs"]
    source = inspect.getsource(CompiledKernel._init_handles)
    assert "self.n_regs" in source
    assert isinstance(triton.runtime.jit.MockTensor.wrap_dtype(torch.float32), triton.runtime.jit.MockTensor)

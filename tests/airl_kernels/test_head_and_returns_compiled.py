"""Every launch the token head and returns ship, compiled for A100, H100/H200 and B200 from this machine."""

import pytest
from airl_kernels.testing import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

KERNELS = {
    "token_head": {
        "_fused_kernel", "_reduce_kernel", "_rewards_kernel", "_gradient_kernel", "_scale_kernel", "_runs_kernel",
        "_join_kernel", "_score_kernel", "_pair_kernel", "_spread_kernel",
    },
    "returns": {"_scan_kernel", "_moments_kernel", "_summary_kernel", "_carry_kernel", "_finish_kernel"},
}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("family", KERNELS)
def test_no_kernel_spills_or_outgrows_the_chip(family, arch):
    from airl_kernels.cross_compile import cross_compile, shipped_launches

    launches = shipped_launches((family,))
    reports = [report for name, call in launches.items() for report in cross_compile(name, call, arch)]
    assert {report.kernel for report in reports} == KERNELS[family]
    assert [f"{report.launch}: {problem}" for report in reports for problem in report.problems] == []
    assert all(report.occupancy >= 0.1 for report in reports)


def test_hidden_moves_sixteen_bytes_at_a_time():
    """The fused kernel loads tiles of bf16 rows asynchronously and stores its gradient, both in whole vectors."""
    from airl_kernels.cross_compile import compiled_kernels, shipped_launches

    call = shipped_launches(("token_head",))["discriminator_loss bce linear H=896"]
    (fused,) = (kernel for kernel in compiled_kernels(call, 90) if kernel.name == "_fused_kernel")
    assert "cp.async.cg.shared.global" in fused.asm["ptx"]
    assert "st.global.v4.b32" in fused.asm["ptx"]


@pytest.mark.parametrize("name", ["discounted_returns 1024x8192", "discounted_returns masked 272x300"])
def test_returns_move_sixteen_bytes_at_a_time(name):
    """Loads everywhere, whatever the sequences' ends; stores where the whole tile is the sequence's."""
    from airl_kernels.cross_compile import compiled_kernels, shipped_launches

    (scan,) = compiled_kernels(shipped_launches(("returns",))[name], 90)
    assert "cp.async.cg.shared.global" in scan.asm["ptx"]
    assert "st.global.v4.b32" in scan.asm["ptx"]


@pytest.mark.parametrize(
    ("op", "bytes_read", "arch", "multiprocessors"),
    [("discounted_returns", 5, 80, 108), ("discounted_returns", 5, 90, 132), ("gae", 9, 90, 132)],
)
def test_a_thousand_padded_sequences_are_one_launch_and_one_wave(op, bytes_read, arch, multiprocessors):
    """No second launch, for offsets or anything; every program resident at once, enough of their tiles under way."""
    from airl_kernels.cross_compile import CHIPS, compiled_kernels, resource_usage, shipped_launches
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorded(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names += (function.overloadpacket.__name__,)
            return function(*args, **(kwargs or {}))

    call = shipped_launches(("returns",))[f"{op} padded 1024x8192"]
    with Recorded() as called:
        (scan,) = compiled_kernels(call, arch)
    assert set(called.names) <= {"empty_like", "view", "detach"}
    meta, registers = scan.metadata, resource_usage(scan.asm["cubin"])["REG"]
    resident = CHIPS[arch].multiprocessor.resident(meta.num_warps, registers, meta.shared)
    assert resident * multiprocessors >= 1024
    # The tiles in shared memory, but the one at work, are under way; a share of the traffic is written, not read.
    under_way = min(resident, 1024 / multiprocessors) * (meta.shared // (512 * bytes_read) - 1) * 512 * bytes_read
    assert under_way >= 40e3


@pytest.mark.parametrize("width", [896, 1536, 3584, 4096, 8192])
def test_enough_of_hidden_is_under_way(width):
    """At the number of programs that fit: about 40 KB a multiprocessor of an H200 draw its memory's full rate."""
    from airl_kernels.cross_compile import CHIPS, compiled_kernels, resource_usage, shipped_launches
    from airl_kernels.token_head_triton import fused_tile

    call = shipped_launches(("token_head",))[f"discriminator_loss bce linear H={width}"]
    (fused,) = (kernel for kernel in compiled_kernels(call, 90) if kernel.name == "_fused_kernel")
    registers, meta = resource_usage(fused.asm["cubin"])["REG"], fused.metadata
    resident = CHIPS[90].multiprocessor.resident(meta.num_warps, registers, meta.shared)
    tile = fused_tile(width, False)
    size = 2 * tile.block_n * tile.block_h
    assert resident * (meta.shared // size - 1) * size >= 31 << 10
    assert resident * 132 * width * 8 < 0.15 * 4 * 32768 * width  # parts of d weight, written and read


def test_a_spill_is_noticed():
    """The check itself: a kernel told to keep far more than fits in 32 registers must be reported."""
    import torch
    from airl_kernels.cross_compile import cross_compile
    from airl_kernels.token_head_triton import _reduce_kernel

    parts = torch.empty((512, 4096), device="meta")

    def squeezed() -> None:
        _reduce_kernel[(1,)](
            parts, parts, parts, None, None, 512, 4096, BLOCK_P=512, BLOCK_H=64, num_warps=4, maxnreg=32
        )

    (report,) = cross_compile("squeezed", squeezed, 80)
    assert report.local_bytes > 0
    assert "register spills" in report.problems[0]


def test_occupancy_by_hand():
    """CUDA C++ programming guide: 64 warps, 65536 registers and 164 KB of shared memory on an A100."""
    from airl_kernels.cross_compile import occupancy

    assert occupancy(80, num_warps=8, registers=32, shared_bytes=0) == 1.0
    assert occupancy(80, num_warps=8, registers=64, shared_bytes=0) == 0.5
    assert occupancy(80, num_warps=4, registers=128, shared_bytes=0) == 0.25
    assert occupancy(80, num_warps=4, registers=33, shared_bytes=0) == 12 * 4 / 64  # 40 registers after rounding
    assert occupancy(80, num_warps=4, registers=16, shared_bytes=80 * 1024) == 2 * 4 / 64
    assert occupancy(90, num_warps=4, registers=16, shared_bytes=80 * 1024) == 2 * 4 / 64
    assert occupancy(90, num_warps=1, registers=16, shared_bytes=0) == 0.5  # 32 blocks at most

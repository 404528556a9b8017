"""Every launch the token head and returns ship, compiled for A100, H100/H200 and B200 from this machine."""

import pytest
from airl_kernels.testing import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")

KERNELS = {
    "token_head": {
        "_fused_kernel", "_reduce_kernel", "_rewards_kernel", "_gradient_kernel", "_scale_kernel", "_runs_kernel",
        "_join_kernel", "_score_kernel", "_pair_kernel", "_spread_kernel",
    },
    "returns": {
        "_scan_kernel", "_moments_kernel", "_summary_kernel", "_carry_kernel", "_finish_kernel",
        "_value_gradient_kernel",
    },
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


def test_returns_move_sixteen_bytes_at_a_time():
    """Inside a sequence, whose blocks lie at multiples of their size."""
    from airl_kernels.cross_compile import compiled_kernels, shipped_launches

    call = shipped_launches(("returns",))["discounted_returns 1024x8192"]
    (scan,) = compiled_kernels(call, 90)
    assert "ld.global.v4.b32" in scan.asm["ptx"]
    assert "st.global.v4.b32" in scan.asm["ptx"]


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

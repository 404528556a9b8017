"""Every launch of log-probabilities, policy losses and rows, compiled for three chips: no spills, and it fits."""

import pytest
from airl_kernels.testing import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")


def launches():
    from airl_kernels.cross_compile import shipped_launches

    return shipped_launches(("logprob", "policy_loss", "_rows"))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_no_kernel_spills_or_outgrows_the_chip(arch):
    from airl_kernels.cross_compile import cross_compile

    reports = [report for name, call in launches().items() for report in cross_compile(name, call, arch)]
    assert {report.kernel for report in reports} == {
        "_stats_kernel", "_gradient_kernel", "_scale_kernel", "_terms_kernel", "_sequence_kernel",
        "_totals_kernel", "_runs_kernel", "_join_kernel",
    }  # fmt: skip
    assert [f"{report.launch}: {problem}" for report in reports for problem in report.problems] == []
    # The kernels are bound by memory: enough warps must be resident to keep it busy.
    assert all(report.occupancy >= 0.25 for report in reports)


@pytest.mark.parametrize("vocab", [151936, 50257])
def test_rows_are_read_and_written_sixteen_bytes_at_a_time(vocab):
    """Also for a vocabulary that is no multiple of anything: whole tiles carry no mask."""
    from airl_kernels.cross_compile import _compile_only

    for name in (f"row_stats V={vocab}", f"logit_gradient V={vocab}"):
        compiled = {}
        with _compile_only(90, compiled):
            launches()[name]()
        (kernel,) = compiled.values()
        text = kernel.asm["ptx"]
        if name.startswith("row_stats"):
            assert "cp.async.cg.shared.global" in text
            assert ", 0x10" in text
        else:
            assert "ld.global.v4.b32" in text
            assert "st.global.v4.b32" in text

"""The C++ CPU kernels: equal to the plain-torch bodies, independent of threads, absent with a reason."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from airl_kernels import native, returns, token_head
from airl_kernels.testing import INTERPRETED, TokenHead, make_token_head

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the launchers stand where the C++ kernels would")
built = pytest.mark.skipif(not native.status().available, reason=f"no C++ kernels: {native.status().reason}")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
HEADS = {
    "linear": {},
    "no bias, offset": {"bias": None, "offset": True},
    "action": {"vocabulary": 9, "bias": 9, "offset": True},
    "action, one bias": {"vocabulary": 9},
    "many blocks": {"rows": 1300, "width": 7},
    "no rows": {"rows": 0},
    "odd width": {"rows": 70, "width": 131},
}


def make_head(rows: int = 120, width: int = 40, **options) -> TokenHead:
    return make_token_head(rows, width, **options)


def close(ours, reference, dtype: torch.dtype) -> None:
    """Same shapes and types; equal to some units of rounding of the largest number, sums of terms near 1 included."""
    ours, reference = ((x,) if isinstance(x, torch.Tensor) else x for x in (ours, reference))
    for a, b in zip(ours, reference, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        finite = b.isfinite()
        assert torch.equal(a[~finite], b[~finite]) or not bool((~finite).any())
        if finite.any():
            allowed = 32 * torch.finfo(dtype).eps * max(float(b[finite].abs().max()), 0.1)
            assert float((a[finite].double() - b[finite].double()).abs().max()) <= allowed


def arguments(dtype: torch.dtype, **shape) -> dict[str, tuple]:
    """The op calls that a head of this shape makes, by name and variant."""
    head = make_head(**shape).cast(dtype)
    hidden, weight, bias = (None if t is None else t.detach() for t in head.args)
    index, offset = head.index, None if head.offset is None else head.offset.detach()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    cu_seqlens = head.cu_seqlens if hidden.shape[0] else head.cu_seqlens.new_zeros(8)
    slopes = torch.randn(hidden.shape[0], generator=torch.Generator().manual_seed(5)).to(compute)
    slopes[::3] = 0
    calls = {f"head_gradients {n}": (slopes, hidden, weight, bias, index, *n) for n in ((True, True), (False, True))}
    for kind in token_head.REWARD_KINDS:
        for temperature, clip in ((1.0, None), (0.6, 1.5)):
            rest = (hidden, weight, bias, index, offset, kind, temperature, clip)
            calls[f"token_rewards {kind} {clip}"] = rest
            calls[f"token_rewards_backward {kind} {clip}"] = (slopes, *rest, True, True)
    for loss in token_head.LOSSES:
        calls[f"discriminator_loss {loss}"] = (
            hidden, weight, bias, head.targets.to(compute), head.weights.to(compute), index, offset, cu_seqlens,
            head.pairs, loss, 0.1, 0.5, True, True,
        )  # fmt: skip
    return calls


@built
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", HEADS.values(), ids=HEADS.keys())
def test_token_head_equals_the_reference(shape, dtype):
    for call, args in arguments(dtype, **shape).items():
        name = call.split()[0]
        ours = getattr(torch.ops.airl_kernels, name)(*args)
        close(ours, getattr(token_head, f"{name}_reference")(*args), dtype)


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("lengths", [[5, 0, 1, 300, 2], [0, 0], [], [4000]], ids=str)
def test_returns_equal_the_reference(lengths, dtype):
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    x, v = torch.randn(2, tokens, generator=torch.Generator().manual_seed(0)).to(dtype).unbind(0)
    group = torch.tensor([3, 3, 1, 3, 1][: len(lengths)], dtype=torch.int64)
    calls = []
    for mask in (None, torch.rand(tokens, generator=torch.Generator().manual_seed(1)) > 0.5):
        for gamma in (0.9, 1.0, 0.0):
            calls += [("discounted_returns", (x, cu_seqlens, mask, gamma, adjoint)) for adjoint in (False, True)]
            calls += [(name, (x, v, cu_seqlens, mask, gamma, 0.8)) for name in ("gae", "gae_backward")]
    for baseline in returns.BASELINES:
        calls += [("group_advantages", (x, cu_seqlens, group, 0.9, baseline, 1e-6, low)) for low in (0.0, 0.5)]
    for name, args in calls:
        close(getattr(torch.ops.airl_kernels, name)(*args), getattr(returns, f"{name}_reference")(*args), dtype)


@built
@pytest.mark.parametrize("vocabulary", [None, 9])
def test_results_do_not_depend_on_the_number_of_threads(vocabulary):
    calls = arguments(torch.float32, rows=3000, width=33, vocabulary=vocabulary)
    args = calls["discriminator_loss bce"]
    threads = torch.get_num_threads()
    try:
        runs = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append(torch.ops.airl_kernels.discriminator_loss(*args))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@built
def test_a_row_that_the_weight_does_not_have():
    head = make_head(vocabulary=4)
    head = replace(head, index=head.index.clone().fill_(4))
    with pytest.raises(IndexError, match="index must lie within the 4 rows of weight, got 4 to 4"):
        torch.ops.airl_kernels.token_rewards(*head.args, head.index, None, "logit", 1.0, None)


@built
def test_rounding_to_bfloat16_is_to_nearest_even_and_keeps_nan():
    """d hidden = slope · weight: chosen so that the product lies halfway between two bfloat16 numbers, or is NaN."""
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.0e38, 1e-40, torch.nan, torch.inf])
    hidden = torch.zeros(1, 7, dtype=torch.bfloat16)
    ours, _, _ = torch.ops.airl_kernels.head_gradients(torch.ones(1), hidden, halfway, None, None, True, False)
    assert ours.dtype == torch.bfloat16
    # a float32 weight keeps the head in float32, so the rounding is ATen's; a bfloat16 one is rounded here
    assert torch.equal(ours[0].isnan(), halfway.isnan())
    slope, weight = torch.tensor([1 + 2**-8]), torch.tensor([1.0, 3.0, -1.0, 2.0**127, torch.nan]).bfloat16()
    ours, _, _ = torch.ops.airl_kernels.head_gradients(
        slope, torch.zeros(1, 5, dtype=torch.bfloat16), weight, None, None, True, False
    )
    expected = (slope * weight.float()).bfloat16()
    assert torch.equal(ours[0].isnan(), expected.isnan())
    assert torch.equal(ours[0].nan_to_num(7.0), expected.nan_to_num(7.0))


def test_the_environment_leaves_them_out():
    code = "from airl_kernels import native; s = native.status(); print(s.available, s.reason)"
    environment = {**os.environ, "AIRL_KERNELS_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False AIRL_KERNELS_NATIVE=0 is set."


def test_a_library_that_does_not_fit_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    monkeypatch.delenv("AIRL_KERNELS_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "_native.so")
    assert native._load().reason.startswith("not built; install a C++ compiler")
    native.LIBRARY.write_bytes(b"not a library")
    status = native._load()
    assert not status.available
    assert "does not fit torch" in status.reason


@built
def test_every_op_is_overridden():
    for name in native.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"airl_kernels::{name}", "CPU"), name


def test_the_import_is_light_and_does_not_reach_for_triton():
    """Beyond torch itself: under 0.3 s, and no triton."""
    code = (
        "import sys, time, torch; start = time.process_time(); import airl_kernels\n"
        "print(time.process_time() - start, 'triton' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    seconds, triton = run.stdout.split()
    assert float(seconds) < 0.3
    assert triton == "False"


@built
def test_groups_that_do_not_fit_the_sequences_are_refused_not_read():
    rewards, offsets = torch.ones(5), torch.tensor([0, 2, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="one entry a sequence"):
        torch.ops.airl_kernels.group_advantages(rewards, offsets, torch.zeros(6).long(), 0.9, "last_token", 1e-6, 0.0)

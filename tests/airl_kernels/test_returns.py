"""Discounted returns, group advantages and GAE against loops in float64: values, gradients, edges, compile, errors."""

import math
from itertools import pairwise

import pytest
import torch
from airl_kernels import discounted_returns, gae, group_advantages, returns
from airl_kernels.testing import (
    INTERPRETED,
    assert_as_careful,
    by_sequence,
    coin,
    expected_advantages,
    expected_gae,
    expected_returns,
    loop_gae,
    loop_returns,
    normal,
    offsets,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck

from tests.airl_kernels.cases import DEVICES, EXAMPLES, SEEDS

BASELINES = ("last_token", "all_tokens", "leave_one_out")
devices = pytest.mark.parametrize("device", DEVICES)
not_a_kernel = pytest.mark.skipif(INTERPRETED, reason="does not reach a Triton kernel")
LENGTHS = [
    [5],
    [1],
    [1, 1, 1],
    [0, 3, 0, 0, 7, 1, 0],
    [300, 17, 256, 255, 257, 1],
]
lengths_of = pytest.mark.parametrize("lengths", LENGTHS, ids=str)


# ---- discounted returns ----------------------------------------------------------------------------------------


@devices
@lengths_of
@pytest.mark.parametrize("gamma", [0.9, 1.0, 0.0])
def test_packed_returns(gamma, lengths, device):
    outcomes = []
    for seed in SEEDS:
        rewards = normal(sum(lengths), seed, device)
        loops = [
            [x for part in by_sequence(rewards, lengths) for x in loop_returns(part, gamma, dtype=dtype)]
            for dtype in (torch.float32, torch.float64)
        ]
        ours = discounted_returns(rewards, gamma, offsets(lengths, device))
        outcomes.append((ours.cpu(), torch.tensor(loops[0]), torch.tensor(loops[1], dtype=torch.float64)))
    assert_as_careful(*(torch.cat([o[who] for o in outcomes]) for who in range(3)))


@devices
@pytest.mark.parametrize("shape", [(3, 40), (1, 1), (2, 300)])
def test_padded_returns_skip_what_is_masked(shape, device):
    rewards, mask = normal(math.prod(shape), 0, device).view(shape), coin(math.prod(shape), 1, device).view(shape)
    ours = discounted_returns(rewards, 0.9, mask=mask)
    rows = [loop_returns(r, 0.9, k) for r, k in zip(rewards.tolist(), mask.tolist(), strict=True)]
    assert torch.allclose(ours.cpu().double(), torch.tensor(rows, dtype=torch.float64), atol=1e-5)
    assert not ours[~mask].any()
    # the padding's side does not matter, nor what it holds
    padded = torch.nn.functional.pad(rewards, (4, 3), value=torch.nan)
    padded_mask = torch.nn.functional.pad(mask, (4, 3))
    assert torch.allclose(discounted_returns(padded, 0.9, mask=padded_mask)[:, 4:-3], ours, atol=1e-6)
    assert torch.allclose(
        discounted_returns(rewards, 0.9, mask=torch.ones_like(mask)), discounted_returns(rewards, 0.9)
    )


@devices
@pytest.mark.parametrize("lengths", [[4500], [3, 4200, 300]] if INTERPRETED else [[100_000], [3, 99_000, 700]])
@pytest.mark.parametrize("gamma", [0.9] if INTERPRETED else [0.9, 0.999, 1.0])
def test_one_very_long_sequence(gamma, lengths, device):
    """Never through γ^t: at γ = 0.9 that underflows near 820 tokens."""
    gamma = torch.tensor(gamma).item()  # rounding γ itself to float32 would move distant tokens' weights
    rewards = normal(sum(lengths), 3, device)
    exact = expected_returns(rewards, lengths, gamma)
    ours = discounted_returns(rewards, gamma, offsets(lengths, device))
    assert float((ours.cpu() - exact).abs().max() / exact.abs().max()) < 1e-5


@devices
@pytest.mark.parametrize("masked", [True] if INTERPRETED else [False, True])
@pytest.mark.parametrize("parallel", [False, True], ids=["a program a sequence", "tiles in parallel"])
def test_both_ways_to_scan(parallel, masked, device, monkeypatch):
    """The two launch plans of the kernels, whatever the shape would choose; on the plain CPU paths both are one."""
    if device == "cuda" or INTERPRETED:
        from airl_kernels import returns_triton

        monkeypatch.setattr(returns_triton, "tiles_in_parallel", lambda *_: parallel)
        monkeypatch.setattr(returns_triton, "_LONG_TILE", 256)
    lengths = [290, 0, 1, 256, 40, 2]
    rewards, values = (normal(sum(lengths), seed, device).requires_grad_() for seed in (0, 1))
    mask = coin(sum(lengths), 2, device) if masked else None
    cu_seqlens = offsets(lengths, device)
    expected = expected_gae(rewards, values, lengths, 0.95, 0.8, mask)
    for ours, exact in zip(gae(rewards, values, 0.95, 0.8, cu_seqlens, mask=mask), expected, strict=True):
        assert torch.allclose(ours.detach().cpu().double(), exact, atol=2e-5)
    assert_gradients_are_the_transpose(
        lambda r, v: gae(r, v, 0.95, 0.8, cu_seqlens, mask=mask), (rewards, values), device
    )


def assert_gradients_are_the_transpose(linear, inputs: tuple[Tensor, ...], device: str) -> None:
    """For a linear map A, <g, A x> = <Aᵀ g, x>: with x and g random this sees every entry of the gradient."""
    outputs = linear(*inputs)
    incoming = [normal(o.numel(), 7 + i, device).view_as(o) for i, o in enumerate(outputs)]
    gradients = grad(outputs, inputs, incoming)
    for seed in range(3):
        probes = [normal(x.numel(), 20 + seed + 9 * i, device).view_as(x) for i, x in enumerate(inputs)]
        forward = sum((g.double() * o.double()).sum() for g, o in zip(incoming, linear(*probes), strict=True))
        backward = sum((g.double() * p.double()).sum() for g, p in zip(gradients, probes, strict=True))
        assert forward.item() == pytest.approx(backward.item(), rel=1e-4, abs=1e-3)


@devices
@pytest.mark.parametrize("gamma", [0.9, 1.0, 0.0])
def test_gradient_of_returns(gamma, device):
    lengths = [300, 0, 1, 70]
    rewards = normal(sum(lengths), 0, device).requires_grad_()
    cu_seqlens = offsets(lengths, device)
    assert_gradients_are_the_transpose(lambda r: (discounted_returns(r, gamma, cu_seqlens),), (rewards,), device)


@not_a_kernel
def test_gradcheck():
    rewards, values = (normal(14, seed).double().requires_grad_() for seed in (0, 1))
    cu_seqlens, mask = offsets([5, 0, 1, 8]), coin(14, 2)
    assert gradcheck(lambda r: discounted_returns(r, 0.8, cu_seqlens), rewards)
    assert gradcheck(lambda r: discounted_returns(r.view(2, 7), 0.8, mask=mask.view(2, 7)), rewards)
    assert gradcheck(lambda r, v: gae(r, v, 0.9, 0.7, cu_seqlens), (rewards, values))
    assert gradcheck(lambda r, v: gae(r, v, 0.9, 0.7, cu_seqlens, mask=mask), (rewards, values))


@devices
def test_infinities_stay_in_their_sequence(device):
    rewards = torch.tensor([1.0, torch.inf, 2.0, 3.0, torch.nan, 4.0, 5.0], device=device)
    ours = discounted_returns(rewards, 0.5, offsets([3, 1, 2, 1], device)).tolist()
    assert ours[:2] == [torch.inf, torch.inf]
    assert ours[2:4] == [2.0, 3.0]
    assert math.isnan(ours[4])
    assert ours[5:] == [4.0, 5.0]
    assert discounted_returns(rewards[:3], 0.0, offsets([3], device)).tolist() == [1.0, torch.inf, 2.0]


# ---- GAE -------------------------------------------------------------------------------------------------------


@devices
@lengths_of
def test_gae_with_lambda_one_is_returns_minus_values(lengths, device):
    rewards, values = normal(sum(lengths), 0, device), normal(sum(lengths), 1, device)
    advantages, targets = gae(rewards, values, 0.9, 1.0, offsets(lengths, device))
    expected = discounted_returns(rewards, 0.9, offsets(lengths, device))
    assert torch.allclose(targets, expected, atol=1e-5)
    assert torch.allclose(advantages, expected - values, atol=1e-5)


@devices
def test_padded_gae(device):
    rewards, values = normal(60, 0, device).view(3, 20), normal(60, 1, device).view(3, 20)
    mask = coin(60, 2, device).view(3, 20)
    for keep in (None, mask):
        advantages, targets = gae(rewards, values, 0.9, 0.8, mask=keep)
        for row in range(3):
            kept = None if keep is None else keep[row].tolist()
            expected = loop_gae(rewards[row].tolist(), values[row].tolist(), 0.9, 0.8, kept)
            assert advantages[row].tolist() == pytest.approx(expected[0], abs=1e-5)
            assert targets[row].tolist() == pytest.approx(expected[1], abs=1e-5)


@devices
def test_all_tokens_masked(device):
    rewards, mask = normal(6, 0, device), torch.zeros(6, dtype=torch.bool, device=device)
    advantages, targets = gae(rewards, rewards, 0.9, 0.9, offsets([4, 2], device), mask=mask)
    assert not advantages.any()
    assert not targets.any()
    assert not discounted_returns(rewards.view(2, 3), 0.9, mask=mask.view(2, 3)).any()


# ---- group advantages ------------------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("min_std", [0.0, 0.7])
@pytest.mark.parametrize("far", [0.0, 1000.0], ids=["near 0", "far from 0"])
def test_group_advantages(far, min_std, baseline, device):
    lengths = [4, 0, 9, 1, 270, 2, 5, 0, 3, 6]
    group = [7, 7, -2, 7, -2, 7, 50, 3, -2, -2]  # interleaved labels; 50 alone, 3 empty
    rewards = normal(sum(lengths), 5, device) + far
    arguments = 0.9, baseline, 1e-6, min_std
    exact = torch.tensor(expected_advantages(rewards, lengths, group, *arguments), dtype=torch.float64)
    ours = group_advantages(
        rewards, offsets(lengths, device), torch.tensor(group, device=device), 0.9, baseline=baseline, min_std=min_std
    )
    scale = exact.abs().max()
    assert float((ours.cpu() - exact).abs().max() / scale) < 1e-6 * max(far, 1.0)  # r - mean loses far's digits
    lonely = slice(sum(lengths[:6]), sum(lengths[:7]))
    if baseline != "all_tokens":
        assert not ours[lonely].any()


@devices
@pytest.mark.parametrize("baseline", ["last_token", "all_tokens"])
def test_equal_samples_give_zero_not_infinity(baseline, device):
    """Three times 0.1 has a mean that is not 0.1 in floating point: variance by subtraction would not be 0."""
    rewards = torch.full((9,), 0.1, device=device)
    if baseline == "last_token":
        rewards[[0, 4]] = 5.0  # dense rewards before the last may differ
    arguments = offsets([3, 3, 3], device), torch.zeros(3, dtype=torch.int64, device=device), 0.9
    assert not group_advantages(rewards, *arguments, baseline=baseline).any()
    floored = group_advantages(rewards, *arguments, baseline=baseline, min_std=0.5)
    if baseline == "last_token":
        assert floored.tolist()[0] == pytest.approx((5.0 - 0.1) / 0.5, rel=1e-5)
    else:
        assert floored.abs().max() < 1e-6


@devices
def test_groups_do_not_meet(device):
    """NaN and infinity in one group leave the others as they were."""
    lengths, group = [3, 2, 4, 2], torch.tensor([0, 1, 0, 1], device=device)
    clean = normal(11, 0, device)
    broken = clean.clone()
    broken[[2, 6]] = torch.tensor([torch.nan, torch.inf], device=device)
    for baseline in BASELINES:
        results = [
            group_advantages(r, offsets(lengths, device), group, 0.9, baseline=baseline) for r in (clean, broken)
        ]
        for part in (slice(3, 5), slice(9, 11)):
            assert torch.equal(results[0][part], results[1][part])


@devices
def test_nothing_at_all(device):
    empty, none = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    for cu_seqlens, group in ((offsets([], device), none), (offsets([0, 0], device), none.new_zeros(2))):
        assert discounted_returns(empty, 0.9, cu_seqlens).shape == (0,)
        assert group_advantages(empty, cu_seqlens, group, 0.9).shape == (0,)
        assert [t.shape for t in gae(empty, empty, 0.9, 0.9, cu_seqlens)] == [(0,), (0,)]
    assert discounted_returns(torch.zeros(0, 5, device=device), 0.9).shape == (0, 5)


# ---- forms of input, torch.library, torch.compile ---------------------------------------------------------------


@devices
def test_other_dtypes_and_strides(device):
    lengths = [30, 0, 20]
    rewards = normal(100, 0, device)[::2]
    expected = discounted_returns(rewards.contiguous(), 0.9, offsets(lengths, device))
    assert torch.equal(discounted_returns(rewards, 0.9, offsets(lengths, device)), expected)
    assert torch.equal(discounted_returns(rewards, 0.9, offsets(lengths, device).long()), expected)
    half = discounted_returns(rewards.bfloat16(), 0.9, offsets(lengths, device))
    assert half.dtype == torch.float32
    assert torch.allclose(half, discounted_returns(rewards.bfloat16().float(), 0.9, offsets(lengths, device)))
    sideways = normal(50, 1, device).view(10, 5).t()
    mask = coin(50, 2, device).view(10, 5).t()
    assert torch.equal(discounted_returns(sideways, 0.9, mask=mask),
                       discounted_returns(sideways.contiguous(), 0.9, mask=mask.contiguous()))  # fmt: skip


@not_a_kernel
@devices
def test_opcheck(device):
    cu_seqlens, mask, group = offsets([4, 0, 6], device), coin(10, 0, device), torch.tensor([1, 1, 2], device=device)
    leaves = [normal(10, seed, device).requires_grad_() for seed in (0, 1)]
    plain = [leaf.detach() for leaf in leaves]
    for name, arguments in {
        "discounted_returns": (leaves[0], cu_seqlens, mask, 0.9, False),
        "group_advantages": (plain[0], cu_seqlens, group, 0.9, "all_tokens", 1e-6, 0.0),
        "gae": (*leaves, cu_seqlens, mask, 0.9, 0.8),
        "gae_backward": (*plain, cu_seqlens, None, 0.9, 0.8),
    }.items():
        torch.library.opcheck(getattr(torch.ops.airl_kernels, name).default, arguments)


@not_a_kernel
@devices
def test_compile_whole(device):
    cu_seqlens, group = offsets([4, 0, 6], device), torch.tensor([1, 1, 1], device=device)
    leaves = [normal(10, seed, device).requires_grad_() for seed in (0, 1)]

    def run(rewards: Tensor, values: Tensor) -> Tensor:
        advantages, targets = gae(rewards, values, 0.9, 0.8, cu_seqlens)
        padded = discounted_returns(rewards.view(2, 5), 0.9)
        fixed = group_advantages(rewards, cu_seqlens, group, 0.9)
        return (advantages * fixed + targets).square().sum() + padded.square().sum()

    results = [
        (value := f(*leaves), *grad(value, leaves))
        for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager"))
    ]
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-5)


# ---- properties ------------------------------------------------------------------------------------------------

some_lengths = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@settings(max_examples=EXAMPLES, deadline=None)
@given(some_lengths, st.floats(0, 1), st.integers(0, 2**20))
def test_the_recurrence_holds_at_every_token(lengths, gamma, seed):
    rewards = normal(sum(lengths), seed)
    ours = discounted_returns(rewards, gamma, offsets(lengths)).tolist()
    for start, end in pairwise(offsets(lengths).tolist()):
        for t in range(start, end):
            following = ours[t + 1] if t + 1 < end else 0.0
            assert ours[t] == pytest.approx(rewards[t].item() + gamma * following, abs=1e-4)


@settings(max_examples=EXAMPLES, deadline=None)
@given(some_lengths, st.floats(0, 1), st.floats(0, 1), st.booleans(), st.integers(0, 2**20))
def test_gae_of_any_lengths(lengths, gamma, lam, masked, seed):
    rewards, values = normal(sum(lengths), seed), normal(sum(lengths), seed + 1)
    mask = coin(sum(lengths), seed) if masked else None
    exact = expected_gae(rewards, values, lengths, gamma, lam, mask)
    for ours, truth in zip(gae(rewards, values, gamma, lam, offsets(lengths), mask=mask), exact, strict=True):
        assert torch.allclose(ours.double(), truth, rtol=1e-4, atol=1e-4)


@settings(max_examples=EXAMPLES, deadline=None)
@given(some_lengths, st.sampled_from(BASELINES), st.integers(0, 2**20), st.data())
def test_advantages_of_any_grouping(lengths, baseline, seed, data):
    group = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)))
    rewards = normal(sum(lengths), seed)
    exact = torch.tensor(expected_advantages(rewards, lengths, group, 0.9, baseline, 1e-6, 0.0), dtype=torch.float64)
    ours = group_advantages(rewards, offsets(lengths), torch.tensor(group), 0.9, baseline=baseline)
    assert torch.allclose(ours.double(), exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max()) if exact.numel() else 0)


@settings(max_examples=EXAMPLES, deadline=None)
@given(some_lengths, st.integers(0, 2**20), st.floats(-3, 3), st.floats(0.1, 10))
def test_standardising_forgets_shift_and_scale(lengths, seed, shift, scale):
    rewards, group = normal(sum(lengths), seed), torch.zeros(len(lengths), dtype=torch.int64)
    plain, moved = (
        group_advantages(r, offsets(lengths), group, 0.9, eps=0.0) for r in (rewards, rewards * scale + shift)
    )
    assert torch.allclose(plain, moved, rtol=1e-2, atol=1e-2 * float(plain.abs().max()) if plain.numel() else 0)


# ---- errors ----------------------------------------------------------------------------------------------------


def bad_calls() -> dict:
    x, cu, g = torch.zeros(4), offsets([4]), torch.zeros(1, dtype=torch.int64)
    return {
        "needs cu_seqlens; without it, pass [B, T]": (ValueError, lambda: discounted_returns(x, 0.9)),
        "must have shape [N] with cu_seqlens": (ValueError, lambda: discounted_returns(x.view(2, 2), 0.9, cu)),
        "gamma must be within 0 and 1": (ValueError, lambda: discounted_returns(x, 1.5, cu)),
        "lam must be within 0 and 1": (ValueError, lambda: gae(x, x, 0.9, -1.0, cu)),
        "cu_seqlens must be torch.int32 or torch.int64": (TypeError, lambda: discounted_returns(x, 0.9, cu.float())),
        "cu_seqlens must have shape [S+1]": (ValueError, lambda: discounted_returns(x, 0.9, cu[None])),
        "from 0 to the number of tokens 4, got 0 to 3": (ValueError, lambda: discounted_returns(x, 0.9, offsets([3]))),
        "must never decrease": (ValueError, lambda: discounted_returns(x, 0.9, torch.tensor([0, 3, 2, 4]))),
        "mask must be torch.bool": (TypeError, lambda: discounted_returns(x.view(2, 2), 0.9, mask=x.view(2, 2))),
        "mask must have shape [2, 2]": (ValueError, lambda: discounted_returns(x.view(2, 2), 0.9, mask=x.bool())),
        "rewards must have a floating dtype": (TypeError, lambda: discounted_returns(x.long(), 0.9, cu)),
        "values must have shape [4]": (ValueError, lambda: gae(x, x[:2], 0.9, 0.9, cu)),
        "group must be torch.int64": (TypeError, lambda: group_advantages(x, cu, g.int(), 0.9)),
        "group must have shape [1]": (ValueError, lambda: group_advantages(x, cu, torch.zeros(2).long(), 0.9)),
        "baseline must be one of": (ValueError, lambda: group_advantages(x, cu, g, 0.9, baseline="median")),
        "must not be negative": (ValueError, lambda: group_advantages(x, cu, g, 0.9, eps=-1.0)),
    }


@not_a_kernel
@pytest.mark.parametrize("message", bad_calls())
def test_bad_input_is_one_sentence(message):
    error, call = bad_calls()[message]
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value).splitlines()[0]
    assert message in text
    assert text.endswith(".")


@not_a_kernel
def test_the_reference_checks_offsets_too():
    with pytest.raises(ValueError, match="from 0 to the number of tokens 4"):
        returns.discounted_returns_reference(torch.zeros(4), offsets([3]), None, 0.9, False)
    with pytest.raises(ValueError, match="must never decrease"):
        returns.gae_reference(torch.zeros(4), torch.zeros(4), torch.tensor([0, 3, 2, 4]), None, 0.9, 0.9)

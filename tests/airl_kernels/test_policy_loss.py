"""ppo_loss: every variant against its formula, clipping by hand, masks, denominators and statistics."""

import math
from dataclasses import replace

import pytest
import torch
from airl_kernels import ppo_loss
from airl_kernels.policy_loss import _ppo_loss
from airl_kernels.testing import INTERPRETED, VARIANTS, make_policy_tokens, plain_loss, with_garbage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.airl_kernels.cases import DEVICES

LENGTHS = (7, 1, 0, 12, 20)
SIZE = sum(LENGTHS)
CHOICES = {
    "plain": {},
    "wide": {"clip_low": 0.1, "clip_high": 0.28},
    "dual": {"dual_clip": 1.25},
}


def logprobs_of(seed: int = 0, size: int = SIZE) -> torch.Tensor:
    return -torch.rand(size, generator=torch.Generator().manual_seed(seed)).double() * 5


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("extras", [False, True], ids=["bare", "kl and is_ratio"])
@pytest.mark.parametrize(
    ("variant", "choice"), [(v, c) for v in VARIANTS for c in CHOICES if (v, c) != ("cispo", "dual")]
)
@pytest.mark.parametrize("device", DEVICES)
def test_every_variant_matches_its_formula(device, variant, choice, extras, masked):
    exact = logprobs_of().requires_grad_()
    case = make_policy_tokens(exact, LENGTHS, masked=masked, extras=extras, **CHOICES[choice])
    denominator = 333.0 if variant == "dr_grpo" else None
    single = exact.detach().float().to(device).requires_grad_()
    exact = single.detach().cpu().double().requires_grad_()
    expected = plain_loss(exact, case, variant, denominator)
    if masked:
        case = with_garbage(case)
    loss, _ = ppo_loss(single, **case.arguments(torch.float32, device), variant=variant, denominator=denominator)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    (found,), (truth,) = torch.autograd.grad(3.0 * loss, single), torch.autograd.grad(3.0 * expected, exact)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-4, atol=1e-7)


def test_clipping_by_hand():
    # ratios 1.5, 0.5, 1.5, 0.5, 4 with advantages +1, +1, -1, -1, -1; bounds 0.8 and 1.2, dual clip 3
    logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5, 4.0]).log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0])
    loss, stats = ppo_loss(logprobs, torch.zeros(5), advantages, dual_clip=3.0)
    torch.testing.assert_close(stats.token_surrogate, torch.tensor([-1.2, -0.5, 1.5, 0.8, 3.0]))
    assert loss.item() == pytest.approx((-1.2 - 0.5 + 1.5 + 0.8 + 3.0) / 5)
    loss.backward()
    torch.testing.assert_close(logprobs.grad * 5, torch.tensor([0.0, -0.5, 1.5, 0.0, 0.0]))
    assert stats.token_clipped.tolist() == [1, 0, 0, 1, 1]
    assert [s.item() for s in (stats.clip_low, stats.clip_high, stats.dual_clip)] == pytest.approx([0.2, 0.2, 0.2])
    assert stats.clip_fraction.item() == pytest.approx(0.6)


def test_sequence_ratio_by_hand():
    # Log-ratios 0.3 and -0.1 average to 0.1: neither token is clipped at 0.2, though the first alone would be.
    logprobs = torch.tensor([0.3, -0.1]).requires_grad_()
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
    loss, stats = ppo_loss(logprobs, torch.zeros(2), torch.ones(2), None, cu_seqlens, variant="gspo")
    assert loss.item() == pytest.approx(-math.exp(0.1))
    assert stats.clip_fraction.item() == 0
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.full((2,), -math.exp(0.1) / 2))
    _, stats = ppo_loss(logprobs.detach(), torch.zeros(2), torch.ones(2), None, cu_seqlens, variant="ppo")
    assert stats.token_clipped.tolist() == [1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_statistics_are_means_over_loss_tokens(device):
    exact = logprobs_of(1)
    case = make_policy_tokens(exact, LENGTHS, seed=5)
    _, stats = ppo_loss(exact.float().to(device), **with_garbage(case).arguments(torch.float32, device))
    live, log_ratio = case.mask, exact - case.old_logprobs
    ratio, d = log_ratio.exp(), case.ref_logprobs - exact
    high, low = (ratio > 1.2) & (case.advantages > 0), (ratio < 0.8) & (case.advantages < 0)
    surrogate = -torch.minimum(ratio * case.advantages, ratio.clamp(0.8, 1.2) * case.advantages) * case.is_ratio
    expected = {
        "log_ratio": log_ratio, "approx_kl": ratio - 1 - log_ratio, "reference_kl": d.exp() - d - 1,
        "clip_high": high.double(), "clip_low": low.double(), "clip_fraction": (high | low).double(),
        "surrogate": surrogate,
    }  # fmt: skip
    assert stats.num_tokens.item() == live.sum().item()
    assert stats.entropy is None
    assert stats.dual_clip.item() == 0
    for name, per_token in expected.items():
        assert getattr(stats, name).item() == pytest.approx(per_token[live].mean().item(), rel=1e-4, abs=1e-7), name
        if name in ("log_ratio", "reference_kl", "surrogate"):
            tokenwise = getattr(stats, f"token_{name}").cpu().double()
            torch.testing.assert_close(tokenwise, torch.where(live, per_token, 0.0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(stats.token_clipped.cpu(), ((high | low) & live).float())
    assert not any(getattr(stats, name).requires_grad for name in expected)


@pytest.mark.parametrize("exponent", [1e-5, 1e-3, 0.1, 0.3, 2.0, -2.0, -0.2, -1e-4])
@pytest.mark.parametrize("device", DEVICES)
def test_kl_estimate_keeps_its_digits_near_zero(device, exponent):
    old = torch.zeros(1)
    d = torch.tensor([exponent])
    _, stats = ppo_loss(d.to(device), old.to(device), torch.ones(1, device=device), ref_logprobs=(2 * d).to(device))
    exact = torch.expm1(d.double()) - d.double()
    careful = torch.expm1(d) - d
    for found in (stats.approx_kl, stats.reference_kl):
        error = abs(found.item() - exact.item())
        assert error <= 2 * abs(careful.item() - exact.item()) + 4e-7 * exact.item() + 1e-12


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_learn_from(device, variant):
    options = {"variant": variant, "denominator": 10.0 if variant == "dr_grpo" else None}
    cu_seqlens = torch.tensor([0, 2, 4], dtype=torch.int32, device=device)
    logprobs = torch.full((4,), -1.0, device=device).requires_grad_()
    none = torch.zeros(4, dtype=torch.bool, device=device)
    nan = torch.full((4,), torch.nan, device=device)
    loss, stats = ppo_loss(logprobs, nan, nan, none, cu_seqlens, ref_logprobs=nan, beta=0.1, **options)
    assert loss.item() == 0
    assert stats.num_tokens.item() == 0
    assert stats.clip_fraction.item() == 0
    assert not torch.autograd.grad(loss, logprobs)[0].any()
    empty = torch.zeros(0, device=device).requires_grad_()
    for bounds in ([0], [0, 0]):
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
        loss, stats = ppo_loss(empty, empty.detach(), empty.detach(), None, cu_seqlens, **options)
        assert loss.item() == 0
        assert stats.num_tokens.item() == 0
        assert torch.autograd.grad(loss, empty)[0].shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
def test_an_infinite_ratio_is_clipped_without_nan(device):
    # Old probability 0: the ratio overflows. Positive and zero advantages have a finite answer, and so do negative
    # ones under a dual clip.
    old = torch.full((3,), -500.0, device=device)
    logprobs = torch.zeros(3, device=device).requires_grad_()
    loss, stats = ppo_loss(logprobs, old, torch.tensor([1.0, 0.0, -1.0], device=device), dual_clip=3.0)
    torch.testing.assert_close(stats.token_surrogate.cpu(), torch.tensor([-1.2, 0.0, 3.0]))
    assert not torch.autograd.grad(loss, logprobs)[0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device):
    exact = logprobs_of(4)
    case = make_policy_tokens(exact, LENGTHS, seed=4)
    dense = case.arguments(torch.float32, device) | {"variant": "gspo"}

    def spread(value):
        return torch.stack([value, value], 1)[:, 0] if isinstance(value, torch.Tensor) else value

    strided = {name: spread(value) for name, value in dense.items()}
    assert not any(value.is_contiguous() for value in strided.values() if isinstance(value, torch.Tensor))
    logprobs = exact.float().to(device).requires_grad_()
    expected, found = ppo_loss(logprobs, **dense)[0], ppo_loss(spread(logprobs), **strided)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, logprobs), torch.autograd.grad(expected, logprobs))


def test_zero_advantage_is_not_padding():
    logprobs = torch.tensor([-1.0, -2.0]).requires_grad_()
    loss, stats = ppo_loss(logprobs, logprobs.detach(), torch.tensor([2.0, 0.0]))
    assert loss.item() == -1.0
    assert stats.num_tokens.item() == 2
    loss, _ = ppo_loss(logprobs, logprobs.detach(), torch.zeros(2), ref_logprobs=torch.zeros(2), beta=1.0)
    assert loss.item() == pytest.approx(((math.e - 2) + (math.e**2 - 3)) / 2)


@pytest.mark.parametrize("variant", ["ppo", "dapo", "dr_grpo", "cispo", "grpo", "gspo"])
def test_micro_batches_with_the_global_denominator_add_up(variant):
    exact = logprobs_of(3)
    case = make_policy_tokens(exact, LENGTHS, seed=3)
    total = float(len(LENGTHS)) if variant in ("grpo", "gspo") else float(case.mask.sum())

    def run(first, last):
        bounds = case.cu_seqlens.tolist()
        cut = slice(bounds[first], bounds[last])
        part = replace(
            case, old_logprobs=case.old_logprobs[cut], advantages=case.advantages[cut], mask=case.mask[cut],
            ref_logprobs=case.ref_logprobs[cut], is_ratio=case.is_ratio[cut], lengths=LENGTHS[first:last],
        )  # fmt: skip
        leaf = exact[cut].float().requires_grad_()
        loss, _ = ppo_loss(leaf, **part.arguments(torch.float32, "cpu"), variant=variant, denominator=total)
        return loss, torch.autograd.grad(loss, leaf)[0]

    whole, parts = run(0, 5), [run(0, 2), run(2, 4), run(4, 5)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole[0])
    torch.testing.assert_close(torch.cat([g for _, g in parts]), whole[1])


def test_denominator_may_be_a_tensor():
    logprobs = torch.tensor([-1.0, -2.0])
    loss, _ = ppo_loss(logprobs, logprobs, torch.ones(2), denominator=torch.tensor(8))
    assert loss.item() == -0.25


# The gradients of cispo and gspo are not those of their values; the formula test has them.
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - {"cispo", "gspo"}))
def test_gradcheck(variant):
    exact = logprobs_of(9).requires_grad_()
    case = make_policy_tokens(exact, LENGTHS, seed=9)
    assert torch.autograd.gradcheck(
        lambda x: ppo_loss(x, **case.arguments(torch.float64, "cpu"), variant=variant, denominator=50.0)[0], exact
    )


@pytest.mark.skipif(INTERPRETED, reason="checks the registration, which the interpreter replaces")
@pytest.mark.parametrize("sequence", [False, True])
def test_opcheck(sequence):
    logprobs = logprobs_of().float().requires_grad_()
    case = make_policy_tokens(logprobs, LENGTHS)
    old, advantages, ref = (t.float() for t in (case.old_logprobs, case.advantages, case.ref_logprobs))
    cu_seqlens = case.cu_seqlens if sequence else None
    constants, absent = (0.2, 0.2, 3.0, 0.1, 1.5), torch.where(torch.arange(SIZE) % 3 == 0, torch.nan, old)
    for old_logprobs, mask, weights, reference, is_ratio, sampler, surrogate in (
        (old, case.mask, advantages.abs(), ref, ref.exp(), None, "clip"),
        (old, None, None, None, None, None, "cispo"),
        (absent, case.mask, None, ref, None, absent, "clip"),
        (None, case.mask, None, None, None, ref, "cispo"),
        (None, None, None, None, None, None, "clip"),
    ):
        by_sequence = sequence and old_logprobs is not None, sequence and sampler is not None
        columns = old_logprobs, advantages, mask, weights, reference, is_ratio, sampler, cu_seqlens, by_sequence
        torch.library.opcheck(_ppo_loss, (logprobs, *columns, surrogate, constants))


@pytest.mark.skipif(INTERPRETED, reason="the graph is the same")
@pytest.mark.parametrize("variant", ["ppo", "grpo", "gspo"])
def test_compiles_without_a_graph_break(variant):
    logprobs = logprobs_of().float().requires_grad_()
    arguments = make_policy_tokens(logprobs, LENGTHS).arguments(torch.float32, "cpu")

    def run(x):
        loss, stats = ppo_loss(x * 1.0, **arguments, variant=variant)
        return loss, stats.clip_fraction, stats.token_log_ratio

    expected, found = run(logprobs), torch.compile(run, fullgraph=True, backend="aot_eager")(logprobs)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found[0], logprobs), torch.autograd.grad(expected[0], logprobs))


@settings(max_examples=10 if INTERPRETED else 40, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    seed=st.integers(0, 999), masked=st.booleans(), extras=st.booleans(), low=st.floats(0.0, 1.0),
    high=st.floats(0.0, 2.0), dual=st.none() | st.floats(3.5, 5.0),
)  # fmt: skip
def test_any_input_matches_the_formula(variant, lengths, seed, masked, extras, low, high, dual):
    exact = logprobs_of(seed, sum(lengths)).float().double().requires_grad_()
    options = {"clip_low": low, "clip_high": high} | ({} if variant == "cispo" else {"dual_clip": dual})
    case = make_policy_tokens(exact, tuple(lengths), seed=seed, masked=masked, extras=extras, **options)
    single = exact.detach().float().requires_grad_()
    denominator = 7.0 if variant == "dr_grpo" else None
    loss, stats = ppo_loss(single, **case.arguments(torch.float32, "cpu"), variant=variant, denominator=denominator)
    expected = plain_loss(exact, case, variant, denominator)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    (found,), (truth,) = torch.autograd.grad(loss, single), torch.autograd.grad(expected, exact)
    # A ratio within rounding of a bound may fall on either side of it.
    bounds = torch.tensor([1 - low, 1 + high, dual or 1e9]).double()
    edge = ((exact - case.old_logprobs).exp().detach()[:, None] - bounds).abs().amin(1) < 1e-5
    if variant != "gspo" or not edge.any():
        torch.testing.assert_close(found.double()[~edge], truth[~edge], rtol=1e-3, atol=1e-6)
    assert 0 <= stats.clip_fraction.item() <= 1
    assert stats.approx_kl.item() >= 0
    assert stats.reference_kl.item() >= 0


class _Launches(TorchDispatchMode):
    """What a call asks of the device outside its op: calls that make or fill a tensor, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function not in (torch.ops.aten.detach.default, torch.ops.aten.unbind.int):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs the op where this looks")
def test_a_loss_is_its_op_and_a_division():
    """No launch for statistics, whoever reads them; a count of tokens only where it is the denominator."""
    exact = logprobs_of()
    case = make_policy_tokens(exact, LENGTHS)
    arguments = case.arguments(torch.float32, "cpu") | {"cu_seqlens": None}  # which the CPU alone reads
    leaf = exact.float().requires_grad_()
    for denominator, expected in ((10.0, []), (None, ["aten::sum", "aten::clamp"])):
        with _Launches() as launches:
            _, stats = ppo_loss(leaf, **arguments, denominator=denominator)
            read = stats.clip_fraction, stats.token_clipped, stats.num_tokens, stats.approx_kl
        assert launches.names == [*expected, "airl_kernels::ppo_loss", "aten::div.Tensor"]
        assert read[2] == case.mask.sum()


ONES = torch.ones(4)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"variant": "ppo2"}, ValueError, "variant must be one of ppo, grpo"),
        ({"variant": "grpo"}, ValueError, "variant='grpo' averages per sequence and needs cu_seqlens"),
        ({"variant": "gspo"}, ValueError, "needs cu_seqlens"),
        ({"variant": "dr_grpo"}, ValueError, "needs denominator"),
        ({"logprobs": torch.ones(2, 2)}, ValueError, "logprobs must have shape \\[M\\]"),
        ({"logprobs": torch.ones(4).long()}, TypeError, "logprobs must have a floating"),
        ({"old_logprobs": torch.ones(3)}, ValueError, "old_logprobs must have shape \\[4\\]"),
        ({"advantages": torch.ones(4).long()}, TypeError, "advantages must have a floating"),
        ({"loss_mask": torch.ones(4)}, TypeError, "loss_mask must be torch.bool"),
        ({"loss_mask": torch.ones(5).bool()}, ValueError, "loss_mask must have shape"),
        ({"is_ratio": torch.ones(5)}, ValueError, "is_ratio must have shape"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, ValueError, "cu_seqlens must run from 0"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, TypeError, "cu_seqlens must be"),
        ({"beta": 0.1}, ValueError, "beta=0.1 needs ref_logprobs"),
        ({"clip_low": 1.5}, ValueError, "clip_low must be within 0 and 1"),
        ({"clip_high": -0.1}, ValueError, "clip_high at least 0"),
        ({"dual_clip": 1.1}, ValueError, "dual_clip must be above 1 \\+ clip_high"),
        ({"dual_clip": 3.0, "variant": "cispo"}, ValueError, "dual_clip must be above .* not for cispo"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    with pytest.raises(error, match=words):
        ppo_loss(**{"logprobs": ONES, "old_logprobs": ONES, "advantages": ONES, **change})

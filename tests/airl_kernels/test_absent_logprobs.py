"""Log-probabilities that are absent: an old policy that is the policy itself, tokens that no sampler made."""

import math

import pytest
import torch
from airl_kernels import linear_logprob, linear_ppo_loss, ppo_loss
from airl_kernels.testing import (
    INTERPRETED,
    VARIANTS,
    make_policy_tokens,
    make_vocabulary_head,
    plain_logprob,
    plain_loss,
    product_count,
    wide,
)

from tests.airl_kernels.cases import DEVICES

LENGTHS = (9, 1, 0, 14, 16)
SIZE = sum(LENGTHS)
MAPPING = {"temperature": 0.8, "softcap": 8.0, "logit_scale": 1.1}
# How rows are cut is the host's work: one cut is enough where a case takes seconds.
LAYOUTS = [{}, {"chunk_rows": 7}, {"chunk_rows": 7, "compact": True}][2 * INTERPRETED :]
STATS = ("num_tokens", "surrogate", "log_ratio", "approx_kl", "reference_kl", "clip_fraction", "is_ratio",
         "token_logprobs", "token_log_ratio", "token_clipped", "token_is_ratio")  # fmt: skip


def absences(old: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """All, none of a sequence, and some of every sequence, as callers give them."""
    some = torch.where(torch.arange(old.numel(), device=old.device) % 3 == 0, torch.nan, old)
    return {"none given": None, "all NaN": torch.full_like(old, torch.nan), "some NaN": some}


def filled(old: torch.Tensor | None, logprobs: torch.Tensor) -> torch.Tensor:
    """What absence means: the policy itself, held constant."""
    itself = logprobs.detach()
    return itself if old is None else torch.where(old.isnan(), itself, old)


def options_of(variant: str) -> dict[str, object]:
    dual = {} if variant == "cispo" else {"dual_clip": 1.3}
    return {"variant": variant, "denominator": 97.0 if variant == "dr_grpo" else None, **dual}


@pytest.mark.parametrize("absence", ["none given", "all NaN", "some NaN"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_absent_old_policy_is_the_policy_itself(device, variant, absence):
    """Against the float64 formula, and against the same call with logprobs.detach() in its place: to the last bit."""
    exact = -torch.rand(SIZE, generator=torch.Generator().manual_seed(3)).double() * 5
    exact = exact.float().double().requires_grad_()
    case = make_policy_tokens(exact, LENGTHS)
    single = exact.detach().float().to(device).requires_grad_()
    arguments = case.arguments(torch.float32, device) | options_of(variant)
    old = absences(arguments.pop("old_logprobs"))[absence]
    loss, stats = ppo_loss(single, old, **arguments)
    same, expected_stats = ppo_loss(single, filled(old, single), **arguments)
    assert torch.equal(loss, same)
    (found,), (other,) = torch.autograd.grad(loss, single), torch.autograd.grad(same, single)
    assert torch.equal(found, other)
    for name in STATS:
        assert torch.equal(getattr(stats, name), getattr(expected_stats, name)), name
    case.old_logprobs.copy_(filled(None if old is None else old.cpu().double(), exact))
    case.options.update(dual_clip=arguments.get("dual_clip"))
    expected = plain_loss(exact, case, variant, arguments["denominator"])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    (truth,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-4, atol=1e-7)


def compare(device: str, dtype: torch.dtype, frozen: bool, old_of, tolerance: dict, *, loss_options: dict, **options):
    """linear_ppo_loss against linear_logprob and ppo_loss with every old log-probability known."""
    inputs = make_vocabulary_head(SIZE, 6, 60, dtype=dtype, device=device, bias=True, frozen=frozen)
    head = (inputs.hidden, inputs.weight, inputs.targets)
    logprobs = linear_logprob(*head, bias=inputs.bias, **MAPPING)
    arguments = make_policy_tokens(logprobs, LENGTHS).arguments(dtype, device)
    old = old_of(arguments.pop("old_logprobs"))
    sampler = loss_options.get("sampler_logprobs")
    if sampler is not None:
        arguments.pop("is_ratio")
    expected, expected_stats = ppo_loss(logprobs, filled(old, logprobs), **arguments, **loss_options)
    found, stats = linear_ppo_loss(*head, old, bias=inputs.bias, **arguments, **loss_options, **MAPPING, **options)
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs.leaves()), torch.autograd.grad(expected, inputs.leaves()), **tolerance
    )
    for name in STATS:
        torch.testing.assert_close(getattr(stats, name), getattr(expected_stats, name), **tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("absence", ["none given", "some NaN"])
@pytest.mark.parametrize("variant", ["ppo", "gspo"] if INTERPRETED else VARIANTS)
@pytest.mark.parametrize("device", DEVICES)
def test_from_hidden_states_as_from_the_composition(device, variant, absence, frozen, layout):
    dtype, tolerance = torch.float64, {"rtol": 1e-9, "atol": 1e-12}
    if INTERPRETED or device == "cuda":  # float64 is the formula's on every device
        dtype, tolerance = torch.float32, {"rtol": 2e-4, "atol": 2e-5}
    options = {"loss_options": options_of(variant), **layout}
    compare(device, dtype, frozen, lambda old: absences(old)[absence], tolerance, **options)


# ---- weights of trainer against sampler ------------------------------------------------------------------------


def sampled(seed: int = 5) -> torch.Tensor:
    """log π_sampler f64 [SIZE] about as likely as the targets of `compare`; some tokens, and a sequence, have none."""
    sampler = -4.0 + torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).double()
    sampler[::4] = torch.nan
    sampler[LENGTHS[0] : LENGTHS[0] + LENGTHS[1]] = torch.nan
    return sampler


def weights_by_hand(old, sampler, mask, level: str, ceiling: float) -> list[float]:
    """min(π_old / π_sampler, ceiling), a token's own or its sequence's product over the mask, in Python floats."""
    found, first = [], 0
    for length in LENGTHS:
        logs = [0.0 if math.isnan(b) else a - b for a, b in zip(old[first:][:length], sampler[first:][:length])]  # noqa: B905
        if level == "sequence":
            logs = [sum(x for x, live in zip(logs, mask[first:][:length], strict=False) if live)] * length
        found += [min(math.exp(x), ceiling) if live else 0.0 for x, live in zip(logs, mask[first:], strict=False)]
        first += length
    return found


@pytest.mark.parametrize("absence", ["known", "none given", "some NaN"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_the_truncated_ratio_of_trainer_and_sampler(device, level, absence):
    exact = (-4.0 + torch.randn(SIZE, generator=torch.Generator().manual_seed(1))).double()
    case = make_policy_tokens(exact, LENGTHS)
    arguments = case.arguments(torch.float32, device)
    known = arguments.pop("old_logprobs")
    old = known if absence == "known" else absences(known)[absence]
    arguments.pop("is_ratio")
    logprobs = exact.float().to(device).requires_grad_()
    sampler = sampled()
    expected = weights_by_hand(filled(old, logprobs).tolist(), sampler.tolist(), case.mask.tolist(), level, 1.7)
    options = {"sampler_logprobs": sampler.to(device), "is_ceiling": 1.7, "is_level": level}
    loss, stats = ppo_loss(logprobs, old, **arguments, **options)
    torch.testing.assert_close(stats.token_is_ratio.cpu(), torch.tensor(expected), rtol=2e-5, atol=0)
    assert 1.7 in expected and min(w for w, live in zip(expected, case.mask, strict=True) if live) < 0.9
    by_weight, _ = ppo_loss(logprobs, old, **arguments, is_ratio=torch.tensor(expected, device=device))
    torch.testing.assert_close(loss, by_weight, rtol=1e-4, atol=1e-6)
    found, truth = (torch.autograd.grad(value, logprobs)[0] for value in (loss, by_weight))
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-7)  # the weight is held constant


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("variant", ["ppo", "gspo"])
@pytest.mark.parametrize("device", DEVICES)
def test_weights_from_hidden_states(device, variant, level, frozen, layout):
    dtype, tolerance = torch.float64, {"rtol": 1e-9, "atol": 1e-12}
    if INTERPRETED or device == "cuda":
        dtype, tolerance = torch.float32, {"rtol": 1e-3, "atol": 5e-5}
    sampler = sampled().to(device, dtype)
    options = options_of(variant) | {"sampler_logprobs": sampler, "is_ceiling": 1.7, "is_level": level}
    absent = (lambda old: None) if variant == "ppo" else (lambda old: absences(old)["some NaN"])
    compare(device, dtype, frozen, absent, tolerance, loss_options=options, **layout)


# ---- extremes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_what_cannot_be_a_ratio(device):
    """A target of probability 0 under an absent old policy has ratio 1; an undefined log-probability stays NaN."""
    logprobs = torch.tensor([-torch.inf, -1.0, torch.nan], device=device).requires_grad_()
    ones = torch.ones(3, device=device)
    loss, stats = ppo_loss(logprobs, None, ones, sampler_logprobs=torch.full_like(ones, torch.nan))
    assert stats.token_surrogate.tolist()[:2] == [-1.0, -1.0]
    assert stats.token_surrogate[2].isnan() and loss.isnan()
    mask = torch.tensor([True, True, False], device=device)
    loss, stats = ppo_loss(logprobs, None, ones, mask)
    assert loss.item() == -1.0 and stats.num_tokens.item() == 2
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [-0.5, -0.5, 0.0]
    empty = torch.zeros(0, device=device).requires_grad_()
    loss, _ = ppo_loss(empty, None, empty.detach())
    assert loss.item() == 0 and torch.autograd.grad(loss, empty)[0].shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
def test_impossible_tokens_leave_finite_gradients(device):
    inputs = make_vocabulary_head(4, 8, 50, device=device, frozen=True)
    bias = torch.zeros(50, device=device)
    bias[10:30] = -torch.inf
    targets = torch.tensor([0, 15, 35, 49], device=device)
    loss, _ = linear_ppo_loss(inputs.hidden, inputs.weight, targets, None, torch.ones(4, device=device), bias=bias)
    (gradient,) = torch.autograd.grad(loss, inputs.hidden)
    assert loss.item() == -1.0 and gradient.isfinite().all() and gradient.any(1).all()


# ---- products --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="counts the products of the torch loop, which is the same")
@pytest.mark.parametrize(
    ("variant", "level", "frozen", "chunk_rows", "count"),
    [
        ("ppo", None, False, 32, 3), ("ppo", None, True, 32, 2), ("gspo", None, False, 32, 3),
        ("cispo", "token", False, 32, 3), ("ppo", "token", False, 32, 3), ("ppo", "token", True, 32, 2),
        ("ppo", "sequence", False, None, 3), ("ppo", "sequence", True, 32, 2), ("ppo", "sequence", False, 32, 4),
    ],
)  # fmt: skip
def test_an_absent_old_policy_costs_no_product(variant, level, frozen, chunk_rows, count):
    rows, width, vocab = 96, 8, 500
    inputs = make_vocabulary_head(rows, width, vocab, frozen=frozen)
    case = make_policy_tokens(plain_logprob(wide(inputs))[0], (50, 46), extras=False)
    arguments = case.arguments(torch.float32, "cpu") | {"old_logprobs": None, "is_ratio": None, "variant": variant}
    if level is not None:
        arguments |= {"sampler_logprobs": case.old_logprobs, "is_level": level}
    head = inputs.hidden, inputs.weight, inputs.targets

    def run():
        linear_ppo_loss(*head, **arguments, chunk_rows=chunk_rows)[0].backward()

    assert product_count(run, rows, width, vocab) == count


# ---- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"is_ratio": torch.ones(4)}, ValueError, "is_ratio and sampler_logprobs both give the importance weight"),
        ({"is_level": "sequence"}, ValueError, "is_level='sequence' needs cu_seqlens"),
        ({"is_level": "group"}, ValueError, "is_level must be one of token, sequence"),
        ({"is_ceiling": 0.0}, ValueError, "is_ceiling must be above 0, got 0.0"),
        ({"is_ceiling": math.nan}, ValueError, "is_ceiling must be above 0, got nan"),
        ({"sampler_logprobs": torch.ones(3)}, ValueError, "sampler_logprobs must have shape"),
        ({"sampler_logprobs": torch.ones(4).long()}, TypeError, "sampler_logprobs must have a floating"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    ones = torch.ones(4)
    with pytest.raises(error, match=words):
        ppo_loss(ones, None, ones, **{"sampler_logprobs": ones, **change})

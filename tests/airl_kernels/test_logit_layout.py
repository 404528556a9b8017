"""Which rows of the weight are tokens, and the type that logits are kept in."""

from collections.abc import Callable

import pytest
import torch
from airl_kernels import linear_logprob, linear_ppo_loss
from airl_kernels.testing import (
    INTERPRETED,
    VocabularyHead,
    assert_as_good_as,
    make_policy_tokens,
    make_vocabulary_head,
    peak_bytes,
    plain_logprob,
    product_count,
    rms_error,
    wide,
)
from torch.profiler import ProfilerActivity, profile

from tests.airl_kernels.cases import DEVICES

LENGTHS = (9, 0, 21)
ROWS = sum(LENGTHS)


def losses(head: VocabularyHead, **options: object) -> dict[str, torch.Tensor]:
    """A scalar of each op, and the values behind it."""
    logprob, entropy = linear_logprob(
        head.hidden, head.weight, head.targets, bias=head.bias, entropy=True, chunk_rows=11, **options
    )
    case = make_policy_tokens(torch.full((ROWS,), -5.0), LENGTHS)
    arguments = case.arguments(torch.promote_types(head.hidden.dtype, torch.float32), head.hidden.device.type)
    loss, stats = linear_ppo_loss(
        head.hidden, head.weight, head.targets, bias=head.bias, chunk_rows=11, **arguments, **options
    )
    return {"logprob": logprob.sum(), "entropy": entropy.sum(), "loss": loss, "reported": stats.entropy}


# ---- padding of the vocabulary ---------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("num_tokens", [1, 97] if INTERPRETED else [1, 97, 128, 130])
@pytest.mark.parametrize("device", DEVICES)
def test_tokens_alone_count(device, num_tokens, frozen):
    """Exactly what a slice gives, and a gradient of 0 for the rest, whatever it holds."""
    head = make_vocabulary_head(ROWS, 8, 130, device=device, bias=True, frozen=frozen)
    with torch.no_grad():
        head.weight[num_tokens:] = torch.nan
        head.bias[num_tokens:] = torch.inf
    head = VocabularyHead(head.hidden, head.weight, head.bias, head.targets % num_tokens)
    sliced = VocabularyHead(head.hidden, head.weight[:num_tokens], head.bias[:num_tokens], head.targets)
    found, expected = losses(head, num_tokens=num_tokens), losses(sliced)
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
        if value.requires_grad:
            ours, theirs = (torch.autograd.grad(v, head.leaves(), retain_graph=True) for v in (value, expected[name]))
            assert all(map(torch.equal, ours, theirs)), name
            assert not any(g[num_tokens:].any() for g in ours[1:])


@pytest.mark.skipif(INTERPRETED, reason="measures torch's own allocations and products")
def test_padding_costs_neither_a_product_nor_a_copy_of_the_gradient():
    rows, width, vocab, tokens = 40, 64, 4000, 3900
    head = make_vocabulary_head(rows, width, vocab)
    old = torch.full((rows,), -8.0)
    targets = head.targets % tokens

    def run(weight: torch.Tensor, **options: int) -> tuple[torch.Tensor, ...]:
        loss, _ = linear_ppo_loss(head.hidden, weight, targets, old, old, chunk_rows=20, **options)
        return torch.autograd.grad(loss, head.leaves())

    assert product_count(lambda: run(head.weight, num_tokens=tokens), rows, width, tokens) == 3
    whole = vocab * width * 4
    plain = allocated(lambda: run(head.weight))
    assert allocated(lambda: run(head.weight, num_tokens=tokens)) <= plain
    assert allocated(lambda: run(head.weight[:tokens])) > plain + 0.9 * whole  # what the slice's backward makes


def allocated(run: Callable[[], object]) -> int:
    """Bytes of all tensors made during `run`, whether or not they live at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    return sum(max(event.nbytes(), 0) for event in events)


@pytest.mark.parametrize("num_tokens", [0, -1, 12])
def test_a_number_of_tokens_without_meaning_is_refused(num_tokens):
    head = make_vocabulary_head(6, 4, 11)
    ones = torch.ones(6)
    for call in (
        lambda: linear_logprob(head.hidden, head.weight, head.targets, num_tokens=num_tokens),
        lambda: linear_ppo_loss(head.hidden, head.weight, head.targets, ones, ones, num_tokens=num_tokens),
    ):
        with pytest.raises(
            ValueError, match=f"num_tokens must be within 1 and the 11 rows of weight, got {num_tokens}"
        ):
            call()


# ---- logits in float32 -----------------------------------------------------------------------------------------


def large(dtype: torch.dtype, device: str, frozen: bool = False, spread: float = 12.0) -> VocabularyHead:
    return make_vocabulary_head(ROWS, 16, 300, dtype=dtype, device=device, bias=True, frozen=frozen, spread=spread)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_logits_keep_the_digits_that_bfloat16_drops(device):
    head = large(torch.bfloat16, device)
    truth, truth_entropy = plain_logprob(wide(head))
    rounded = linear_logprob(head.hidden, head.weight, head.targets, bias=head.bias, chunk_rows=11)
    exact, entropy = linear_logprob(
        head.hidden, head.weight, head.targets, bias=head.bias, chunk_rows=11, entropy=True, fp32_logits=True
    )
    top = plain_logprob(wide(head))[0].abs().max().item() * 4
    # A sum of 16 terms and a bias, a row's maximum and log-sum: some 32 roundings of numbers below `top`.
    bound = 32 * torch.finfo(torch.float32).eps * top
    assert (exact - truth).abs().max().item() < bound
    assert (entropy - truth_entropy).abs().max().item() < 4 * bound
    assert rms_error(rounded, truth) > 100 * rms_error(exact, truth)
    assert (rounded - truth).abs().max().item() > 0.03


@pytest.mark.parametrize("compact", [False, True], ids=["all rows", "compact"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_float32_logits(device, frozen, compact):
    """In the types of the tensors, better than those of bfloat16 logits; only their last rounding is the same."""
    head = large(torch.bfloat16, device, frozen)
    exact = wide(head)
    truth_logprob = plain_logprob(exact)[0]
    old = truth_logprob.detach().float()
    old[::3] += 0.5  # ratios of 1 and e^-0.5, far from the bounds
    advantages = torch.linspace(-1, 1, ROWS, device=device)
    truth = -(truth_logprob - old).exp() * advantages
    held = (advantages < 0) & ((truth_logprob - old).exp() < 0.8)
    truth = torch.where(held, 0.0, truth).mean()  # a clipped token has no gradient
    expected = torch.autograd.grad(truth, exact.leaves())
    found = {}
    for wide_logits in (False, True):
        loss, _ = linear_ppo_loss(
            head.hidden, head.weight, head.targets, old, advantages, bias=head.bias, chunk_rows=11,
            fp32_logits=wide_logits, compact=compact,
        )  # fmt: skip
        found[wide_logits] = torch.autograd.grad(loss, head.leaves())
    for narrow, ours, exactly in zip(found[False], found[True], expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert_as_good_as(ours, narrow, exactly, "gradient")
        assert rms_error(ours, exactly) < 0.7 * rms_error(narrow, exactly)


def test_float32_logits_of_a_float32_head_are_what_they_were():
    head = large(torch.float32, "cpu")
    for name, value in losses(head, fp32_logits=True).items():
        assert torch.equal(value, losses(head)[name]), name


@pytest.mark.skipif(INTERPRETED, reason="measures torch's own allocations")
def test_a_chunk_of_float32_logits_takes_the_memory_that_it_says():
    """6 bytes a logit, the logit and its gradient: with three times the rows a chunk of bfloat16 takes as much."""
    head = make_vocabulary_head(96, 4, 5000, dtype=torch.bfloat16, frozen=True)

    def peak(chunk_rows: int, wide_logits: bool) -> int:
        settings = {"chunk_rows": chunk_rows, "fp32_logits": wide_logits}
        call = lambda: linear_logprob(head.hidden, head.weight, head.targets, **settings).sum().backward()  # noqa: E731
        return peak_bytes(call)

    # The torch loop of the CPU adds some float32 copies of a chunk; they are the same for both.
    assert peak(32, True) - peak(32, False) < 1.1 * 32 * 5000 * 4 + 5000 * 4 * 4


# ---- float16 ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("device", DEVICES)
def test_logits_beyond_float16_are_finite(device, frozen):
    """The product of torch itself is infinite there and its log-probability NaN."""
    head = large(torch.float16, device, frozen)
    with torch.no_grad():
        head.hidden[::2] *= 1000.0
        head.weight.mul_(4.0)
    assert (head.hidden.double() @ head.weight.double().t()).abs().max() > 1.5 * torch.finfo(torch.float16).max
    assert plain_logprob(head)[0].isnan().any()
    truth, truth_entropy = plain_logprob(wide(head))
    found, entropy = linear_logprob(head.hidden, head.weight, head.targets, bias=head.bias, chunk_rows=11, entropy=True)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=0.05)  # eps of float32 times 2e5, and a bias
    torch.testing.assert_close(entropy.double(), truth_entropy, rtol=1e-3, atol=1e-4)
    exact = wide(head)
    truth = torch.autograd.grad(plain_logprob(exact)[0].mean(), exact.leaves())
    ours = torch.autograd.grad(found.mean(), head.leaves())
    _, stats = linear_ppo_loss(head.hidden, head.weight, head.targets, None, torch.ones_like(found), bias=head.bias)
    assert torch.equal(stats.token_logprobs, found.detach())
    for mine, exactly in zip(ours, truth, strict=True):
        assert mine.dtype == torch.float16 and mine.isfinite().all()
        assert (mine - exactly).abs().max() <= 4 * torch.finfo(torch.float16).eps * exactly.abs().max()

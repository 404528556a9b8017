"""linear_ppo_loss: equal to the loss of plain log-probabilities, in the products and memory it promises."""

import pytest
import torch
from airl_kernels import linear_logprob, linear_ppo_loss, ppo_loss
from airl_kernels.linear_policy_loss import _linear_ppo_loss
from airl_kernels.testing import (
    INTERPRETED,
    VARIANTS,
    PolicyTokens,
    assert_as_good_as,
    in_the_worst_order,
    make_policy_tokens,
    make_vocabulary_head,
    peak_bytes,
    plain_logprob,
    plain_loss,
    product_count,
    products,
    wide,
    with_garbage,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.airl_kernels.cases import DEVICES, DTYPES

LENGTHS = (9, 1, 0, 14, 16)
SIZE = sum(LENGTHS)


def denominator_of(variant: str) -> float | None:
    return 97.0 if variant == "dr_grpo" else None


def fused(inputs, case: PolicyTokens, variant: str = "ppo", **options):
    return linear_ppo_loss(
        inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, variant=variant,
        **case.arguments(torch.float32, inputs.hidden.device.type),
        **{"denominator": denominator_of(variant), **options},
    )  # fmt: skip


@pytest.mark.parametrize(
    "compact", [True] if INTERPRETED else [False, True], ids=lambda on: "compact" if on else "all rows"
)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_error_is_within_twice_that_of_careful_torch(device, dtype, variant, frozen, compact):
    inputs = make_vocabulary_head(
        SIZE, 16, 150 if INTERPRETED else 300, dtype=dtype, device=device, bias=True, frozen=frozen
    )
    exact = wide(inputs)
    mapping = {"temperature": 0.8, "softcap": 8.0, "logit_scale": 1.1}
    truth_logprob, truth_entropy = plain_logprob(exact, **mapping)
    # Ratios far from the bounds, so that rounding moves no token across one.
    case = (
        make_policy_tokens(truth_logprob, LENGTHS, dual_clip=3.0)
        if variant != "cispo"
        else make_policy_tokens(truth_logprob, LENGTHS)
    )
    case.old_logprobs.copy_(
        truth_logprob.detach().float().double() - torch.tensor([0.0, 0.5, -0.5, 1.5, 0.1]).repeat(SIZE // 5)
    )

    def composed(leaves):
        logprob, entropy = (x.cpu() for x in plain_logprob(leaves, **mapping))
        value = plain_loss(logprob, case, variant, denominator_of(variant))
        return logprob[live], entropy[live], value, *torch.autograd.grad(2.0 * value, leaves.leaves())

    live = case.mask
    careful, truth = in_the_worst_order(lambda: composed(inputs)), composed(exact)
    targets = torch.where(case.mask, inputs.targets.cpu(), -100).to(device)
    loss, stats = linear_ppo_loss(
        inputs.hidden, inputs.weight, targets, bias=inputs.bias, variant=variant, chunk_rows=17, compact=compact,
        **with_garbage(case).arguments(torch.float32, device), denominator=denominator_of(variant), **mapping,
    )  # fmt: skip
    assert_as_good_as(stats.token_logprobs.cpu()[live], careful[0], truth[0], "log-probability")
    assert_as_good_as(stats.token_entropy.cpu()[live], careful[1], truth[1], "entropy")
    assert stats.entropy.item() == pytest.approx(truth_entropy[live].mean().item(), rel=2e-2)
    assert_as_good_as(loss.cpu(), careful[2].float(), truth[2], "loss", scale=1.0)
    found = torch.autograd.grad(2.0 * loss, inputs.leaves())
    for name, a, b, c in zip(("hidden", "weight", "bias"), found, careful[3:], truth[3:], strict=False):
        assert a.dtype == dtype
        assert_as_good_as(a, b, c, f"gradient in {name}")


@pytest.mark.parametrize("vocab", [17, 50257, 128256, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_vocabularies_that_fit_no_tile(device, dtype, vocab):
    rows = 2 if INTERPRETED else 5
    inputs = make_vocabulary_head(rows, 16, vocab, dtype=dtype, device=device)
    exact = wide(inputs)
    truth_logprob = plain_logprob(exact)[0].detach()
    case = make_policy_tokens(truth_logprob, (rows,), masked=False)
    case.old_logprobs.copy_(truth_logprob.detach().float().double() - 0.0625)  # exact in fp32, no ratio near a bound

    def composed(leaves):
        logprob = plain_logprob(leaves)[0]
        return logprob, *torch.autograd.grad(plain_loss(logprob.cpu(), case, "ppo"), leaves.leaves())

    loss, stats = fused(inputs, case, chunk_rows=2)
    found = stats.token_logprobs, *torch.autograd.grad(loss, inputs.leaves())
    careful, truth = in_the_worst_order(lambda: composed(inputs)), composed(exact)
    assert_as_good_as(found[0], careful[0], truth[0], "log-probability")
    for name, a, b, c in zip(("hidden", "weight"), found[1:], careful[1:], truth[1:], strict=True):
        # A slope is the exponential of a log-probability, whose last bit is an error of its size.
        scale = truth_logprob.abs().max().item() * c.abs().max().item()
        assert_as_good_as(a, b, c, f"gradient in {name}", scale)


@pytest.mark.parametrize("variant", VARIANTS)
def test_double_precision_equals_the_composition(variant):
    inputs = make_vocabulary_head(SIZE, 6, 40, dtype=torch.float64, bias=True)
    logprob = linear_logprob(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias)
    arguments = make_policy_tokens(logprob, LENGTHS).arguments(torch.float64, "cpu") | {
        "denominator": denominator_of(variant)
    }
    expected, expected_stats = ppo_loss(logprob, **arguments, variant=variant)
    truth = torch.autograd.grad(expected, inputs.leaves())
    for options in ({}, {"chunk_rows": 7}, {"chunk_rows": 7, "compact": True}, {"compact": True}):
        found, stats = linear_ppo_loss(
            inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, variant=variant, **arguments, **options
        )
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, inputs.leaves()), truth)
        for name in ("num_tokens", "surrogate", "approx_kl", "clip_fraction", "token_clipped", "token_logprobs"):
            torch.testing.assert_close(getattr(stats, name), getattr(expected_stats, name))


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradcheck(frozen):
    inputs = make_vocabulary_head(6, 3, 5, dtype=torch.float64, bias=True, frozen=frozen)
    case = make_policy_tokens(plain_logprob(inputs)[0], (4, 2), seed=4)

    def run(hidden, *rest):
        weight, bias = rest or (inputs.weight, inputs.bias)
        return linear_ppo_loss(
            hidden, weight, inputs.targets, bias=bias, chunk_rows=4, softcap=4.0, **case.arguments(torch.float64, "cpu")
        )[0]

    assert torch.autograd.gradcheck(run, inputs.leaves())


@pytest.mark.parametrize("variant", ["ppo", "grpo", "gspo"])
@pytest.mark.parametrize("device", DEVICES)
def test_rows_are_as_if_the_others_were_not_there(device, variant):
    inputs = make_vocabulary_head(3 * SIZE, 8, 50, device=device)
    rows = torch.arange(1, 3 * SIZE, 3, device=device)
    targets = inputs.targets[:SIZE]
    case = make_policy_tokens(plain_logprob(wide(inputs))[0][:SIZE], LENGTHS)
    arguments = case.arguments(torch.float32, device) | {"variant": variant}
    loss, stats = linear_ppo_loss(inputs.hidden, inputs.weight, targets, rows=rows, **arguments)
    picked = inputs.hidden.detach()[rows].requires_grad_()
    expected, _ = linear_ppo_loss(picked, inputs.weight, targets, **arguments)
    assert stats.token_logprobs.shape == (SIZE,)
    torch.testing.assert_close(loss, expected)
    d_hidden, d_weight = torch.autograd.grad(loss, inputs.leaves())
    d_picked, truth = torch.autograd.grad(expected, (picked, inputs.weight))
    torch.testing.assert_close(d_hidden[rows], d_picked)
    torch.testing.assert_close(d_weight, truth)
    assert d_hidden.any(1).sum() <= SIZE
    assert not d_hidden[::3].any()
    assert not d_hidden[2::3].any()


@pytest.mark.parametrize("variant", ["ppo", "grpo"])
def test_chunks_and_global_denominator_are_independent(variant):
    inputs = make_vocabulary_head(SIZE, 8, 60)
    case = make_policy_tokens(plain_logprob(inputs)[0], LENGTHS, seed=2)
    results = []
    for chunk_rows in (7, SIZE, None) if INTERPRETED else (1, 7, 16, SIZE, None):
        loss, _ = fused(inputs, case, variant, chunk_rows=chunk_rows, denominator=12345.0)
        results.append((loss, *torch.autograd.grad(loss, inputs.leaves())))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_to_learn_from(device):
    inputs = make_vocabulary_head(6, 8, 50, device=device)
    nan, none = torch.full((6,), torch.nan, device=device), torch.zeros(6, dtype=torch.bool, device=device)
    for compact in (False, True):
        loss, stats = linear_ppo_loss(
            inputs.hidden, inputs.weight, torch.full_like(inputs.targets, -100), nan, nan, none, compact=compact
        )
        assert loss.item() == 0
        assert stats.num_tokens.item() == 0
        assert stats.entropy.item() == 0
        assert not any(g.any() for g in torch.autograd.grad(loss, inputs.leaves()))
    empty = make_vocabulary_head(0, 8, 50, device=device)
    nothing = torch.zeros(0, device=device)
    loss, _ = linear_ppo_loss(empty.hidden, empty.weight, empty.targets, nothing, nothing)
    assert loss.item() == 0
    assert [g.shape for g in torch.autograd.grad(loss, empty.leaves())] == [(0, 8), (50, 8)]


@pytest.mark.parametrize("device", DEVICES)
def test_impossible_tokens_leave_finite_gradients(device):
    inputs = make_vocabulary_head(4, 8, 50, device=device, frozen=True)
    bias = torch.zeros(50, device=device)
    bias[10:30] = -torch.inf
    targets = torch.tensor([0, 1, 35, 49], device=device)
    old = torch.full((4,), -4.0, device=device)
    loss, stats = linear_ppo_loss(inputs.hidden, inputs.weight, targets, old, old, bias=bias)
    (gradient,) = torch.autograd.grad(loss, inputs.hidden)
    assert loss.isfinite()
    assert stats.entropy.isfinite()
    assert gradient.isfinite().all()
    assert gradient.any()


# ---- products and memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="counts the products of the torch loop, which is the same")
@pytest.mark.parametrize(
    ("variant", "mode", "chunk_rows", "count"),
    [
        ("ppo", "no gradient", 32, 1), ("ppo", "frozen", 32, 2), ("ppo", "trainable", 32, 3),
        ("ppo", "trainable", None, 3),
        ("grpo", "frozen", 32, 2), ("grpo", "trainable", 32, 3), ("cispo", "trainable", 32, 3),
        ("gspo", "no gradient", 32, 1), ("gspo", "frozen", 32, 2), ("gspo", "trainable", None, 3),
        ("gspo", "trainable", 32, 4),
    ],
)  # fmt: skip
def test_number_of_products(variant, mode, chunk_rows, count):
    rows, width, vocab = 96, 8, 500
    inputs = make_vocabulary_head(rows, width, vocab, frozen=mode == "frozen")
    case = make_policy_tokens(plain_logprob(inputs)[0], (50, 46))

    def run():
        if mode == "no gradient":
            with torch.no_grad():
                return fused(inputs, case, variant, chunk_rows=chunk_rows)
        fused(inputs, case, variant, chunk_rows=chunk_rows)[0].backward()
        return None

    assert product_count(run, rows, width, vocab) == count


@pytest.mark.skipif(INTERPRETED, reason="counts the products of the torch loop, which is the same")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_compact_keeps_rows_without_gradient_out_of_the_backward_products(frozen):
    rows, width, vocab = 60, 8, 500
    inputs = make_vocabulary_head(rows, width, vocab, frozen=frozen)
    logprob = plain_logprob(inputs)[0].detach()
    advantages, old, mask = torch.ones(rows), logprob.clone(), torch.ones(rows, dtype=torch.bool)
    advantages[:10], old[10:20], mask[20:30] = 0.0, old[10:20] - 1.0, False  # no advantage, clipped, masked
    seen = products(
        lambda: linear_ppo_loss(
            inputs.hidden, inputs.weight, inputs.targets, old, advantages, mask, compact=True
        )[0].backward()
    )  # fmt: skip
    backward = [(30, 500, 8)] if frozen else [(30, 500, 8), (500, 30, 8)]
    assert sorted(seen) == sorted([(60, 8, 500), *backward])


@pytest.mark.skipif(INTERPRETED, reason="counts the products of the torch loop, which is the same")
def test_rows_without_loss_reach_no_product():
    inputs = make_vocabulary_head(100, 8, 500)
    rows = torch.arange(0, 100, 10)
    zeros = torch.zeros(10)
    seen = products(
        lambda: linear_ppo_loss(inputs.hidden, inputs.weight, inputs.targets[:10], zeros - 5, zeros + 1, rows=rows)[
            0
        ].backward()
    )
    assert sorted(seen) == sorted([(10, 8, 500), (10, 500, 8), (500, 10, 8)])


@pytest.mark.skipif(INTERPRETED, reason="measures torch's own allocations")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_temporaries_do_not_grow_with_the_rows(frozen):
    def peak(rows):
        inputs = make_vocabulary_head(rows, 4, 4000, frozen=frozen)
        case = make_policy_tokens(plain_logprob(inputs)[0], (rows,), masked=False)
        kept = rows * (4 * 2 + 40) * 4  # d hidden twice, and what is stored per row
        return peak_bytes(lambda: torch.autograd.grad(fused(inputs, case, chunk_rows=16)[0], inputs.leaves())) - kept

    assert peak(256) < 1.1 * peak(128) < 5 * 16 * 4000 * 4


@pytest.mark.skipif(INTERPRETED, reason="measures torch's own allocations")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_the_backward_pass_allocates_the_gradients_alone(frozen):
    """None of the zeros that autograd would make for the gradients' own gradients, as large as the weight."""
    inputs = make_vocabulary_head(64, 48, 3000, frozen=frozen)
    case = make_policy_tokens(plain_logprob(inputs)[0], (64,), masked=False)
    loss, _ = fused(inputs, case)
    gradients = sum(4 * leaf.numel() for leaf in inputs.leaves())
    taken = peak_bytes(lambda: torch.autograd.grad(loss, inputs.leaves(), retain_graph=True))
    assert gradients <= taken < 1.1 * gradients


# ---- the machinery ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="checks the registration, which the interpreter replaces")
@pytest.mark.parametrize(("surrogate", "sequence"), [("clip", False), ("clip", True), ("cispo", False)])
def test_opcheck(surrogate, sequence):
    inputs = make_vocabulary_head(SIZE, 4, 11, bias=True)
    case = make_policy_tokens(plain_logprob(inputs)[0], LENGTHS)
    old, advantages, ref = (t.float() for t in (case.old_logprobs, case.advantages, case.ref_logprobs))
    constants, mapping, layout = (0.2, 0.2, 0.0, 0.1, 1.5), (0.8, 5.0, 1.0), (13, 10, False)
    settings = (surrogate, constants, mapping, True, False, *layout, (True, True, True))
    shared = advantages, case.mask, advantages.abs(), ref
    absent = torch.where(torch.arange(SIZE) % 3 == 0, torch.nan, old)
    for former, *weight in ((old, ref.exp(), None), (absent, None, absent - 0.1), (None, None, ref)):
        by_sequence = (sequence and former is not None, sequence and weight[1] is not None)
        columns = (former, *shared, *weight, case.cu_seqlens if sequence else None, by_sequence)
        torch.library.opcheck(
            _linear_ppo_loss, (inputs.hidden, inputs.weight, inputs.targets % 10, inputs.bias, *columns, *settings)
        )


@pytest.mark.skipif(INTERPRETED, reason="the graph is the same")
@pytest.mark.parametrize("variant", ["grpo", "gspo"])
def test_compiles_without_a_graph_break(variant):
    inputs = make_vocabulary_head(SIZE, 4, 11)
    case = make_policy_tokens(plain_logprob(inputs)[0], LENGTHS)

    def run(hidden, weight):
        loss, stats = linear_ppo_loss(
            hidden * 1.0, weight, inputs.targets, **case.arguments(torch.float32, "cpu"), variant=variant
        )
        return loss, stats.entropy, stats.token_logprobs

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, found = run(inputs.hidden, inputs.weight), compiled(inputs.hidden, inputs.weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found[0], inputs.leaves()), torch.autograd.grad(expected[0], inputs.leaves())
    )


@settings(max_examples=3 if INTERPRETED else 25, deadline=None)
@given(
    variant=st.sampled_from(VARIANTS), lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    width=st.integers(1, 5), vocab=st.integers(2, 60), chunk=st.integers(1, 12), seed=st.integers(0, 99),
    compact=st.booleans(), masked=st.booleans(),
)  # fmt: skip
def test_any_shape_equals_the_composition(variant, lengths, width, vocab, chunk, seed, compact, masked):
    inputs = make_vocabulary_head(sum(lengths), width, vocab, seed=seed, bias=True)
    logprob = linear_logprob(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias)
    case = make_policy_tokens(logprob, tuple(lengths), seed=seed, masked=masked)
    expected, _ = ppo_loss(
        logprob, **case.arguments(torch.float32, "cpu"), variant=variant, denominator=denominator_of(variant)
    )
    found, _ = fused(inputs, case, variant, chunk_rows=chunk, compact=compact)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for a, b in zip(
        torch.autograd.grad(found, inputs.leaves()), torch.autograd.grad(expected, inputs.leaves()), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_bad_arguments_are_named():
    inputs = make_vocabulary_head(6, 4, 11)
    ones = torch.ones(6)
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        linear_ppo_loss(inputs.hidden, torch.nn.Linear(4, 11), inputs.targets, ones, ones)
    rows = torch.arange(3)
    with pytest.raises(ValueError, match="old_logprobs must have shape \\[3\\]"):
        linear_ppo_loss(inputs.hidden, inputs.weight, inputs.targets[:3], ones, ones[:3], rows=rows)
    with pytest.raises(ValueError, match="needs denominator"):
        linear_ppo_loss(inputs.hidden, inputs.weight, inputs.targets, ones, ones, variant="dr_grpo")
    with pytest.raises(ValueError, match="chunk_rows must be at least 1"):
        linear_ppo_loss(inputs.hidden, inputs.weight, inputs.targets, ones, ones, chunk_rows=0)

"""`rows` that name a row several times, as when completions share their prompt's last position: gradients add up."""

import pytest
import torch
from airl_kernels import linear_logprob, linear_ppo_loss
from airl_kernels._rows import _add_rows, gather_rows
from airl_kernels.testing import (
    INTERPRETED,
    VARIANTS,
    assert_as_good_as,
    in_the_worst_order,
    make_policy_tokens,
    make_vocabulary_head,
    plain_logprob,
    plain_loss,
    wide,
    with_garbage,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.airl_kernels.cases import DEVICES, DTYPES

# A prompt whose last row (3) starts four completions, neighbours and far apart; row 0 twice; nothing in order.
ROWS = torch.tensor([3, 4, 5, 3, 6, 7, 8, 3, 9, 0, 0, 3, 10, 11])
LENGTHS = (3, 4, 2, 5)
HIDDEN_ROWS = 14


def picked(inputs):
    """The same inputs with the rows gathered by plain indexing."""
    return type(inputs)(inputs.hidden[ROWS.to(inputs.hidden.device)], inputs.weight, inputs.bias, inputs.targets)


@pytest.mark.parametrize("entropy", [False, True], ids=["log-probability", "entropy"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_linear_logprob_adds_up_the_gradients_of_a_row(device, dtype, frozen, entropy):
    inputs = make_vocabulary_head(HIDDEN_ROWS, 16, 150, dtype=dtype, device=device, bias=True, frozen=frozen)
    exact = wide(inputs)
    options = {"temperature": 0.8, "softcap": 8.0}
    weights = torch.randn(len(ROWS), generator=torch.Generator().manual_seed(1))

    def with_gradients(out, leaves):
        return *out, *torch.autograd.grad((out[entropy] * weights.to(out[0])).sum(), leaves.leaves())

    def plain(leaves):
        return with_gradients(plain_logprob(picked(leaves), **options), leaves)

    found = linear_logprob(
        inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, rows=ROWS.to(device), chunk_rows=5,
        entropy=True, **options,
    )  # fmt: skip
    found, careful, truth = with_gradients(found, inputs), in_the_worst_order(lambda: plain(inputs)), plain(exact)
    for what, a, b, c in zip(("log-probability", "entropy"), found, careful, truth, strict=False):
        assert_as_good_as(a, b, c, what)
    for name, a, b, c in zip(("hidden", "weight", "bias"), found[2:], careful[2:], truth[2:], strict=False):
        assert a.dtype == dtype
        assert_as_good_as(a, b, c, f"gradient in {name}")
    assert truth[2][3].abs().sum() > 0
    assert not found[2][[1, 2, 12, 13]].any()


@pytest.mark.parametrize("compact", [False, True], ids=["all rows", "compact"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_linear_ppo_loss_adds_up_the_gradients_of_a_row(device, dtype, variant, frozen, compact):
    inputs = make_vocabulary_head(HIDDEN_ROWS, 16, 150, dtype=dtype, device=device, bias=True, frozen=frozen)
    exact = wide(inputs)
    denominator = 97.0 if variant == "dr_grpo" else None
    truth_logprob = plain_logprob(picked(exact))[0].detach()
    case = make_policy_tokens(truth_logprob, LENGTHS)
    # Ratios far from the bounds, some beyond them, so that rounding moves no token across one.
    shift = torch.tensor([0.0, 0.5, -0.5, 1.5, 0.1, 0.0, 0.1]).repeat(2)
    case.old_logprobs.copy_(truth_logprob.detach().float().double() - shift)
    case.mask[[0, 3, 7]] = True  # of the four uses of row 3, some count
    loss, stats = linear_ppo_loss(
        inputs.hidden, inputs.weight, torch.where(case.mask, inputs.targets.cpu(), -100).to(device), bias=inputs.bias,
        rows=ROWS.to(device), variant=variant, chunk_rows=5, compact=compact, denominator=denominator,
        **with_garbage(case).arguments(torch.float32, device),
    )  # fmt: skip

    def composed(leaves):
        value = plain_loss(plain_logprob(picked(leaves))[0].cpu(), case, variant, denominator)
        return value, *torch.autograd.grad(2.0 * value, leaves.leaves())

    careful, truth = in_the_worst_order(lambda: composed(inputs)), composed(exact)
    assert stats.token_logprobs.shape == ROWS.shape
    assert_as_good_as(loss.cpu(), careful[0].float(), truth[0], "loss", scale=1.0)
    gradients = torch.autograd.grad(2.0 * loss, inputs.leaves())
    for name, a, b, c in zip(("hidden", "weight", "bias"), gradients, careful[1:], truth[1:], strict=False):
        assert a.dtype == dtype
        assert_as_good_as(a, b, c, f"gradient in {name}")
    assert not gradients[0][[1, 2, 12, 13]].any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradcheck(frozen):
    inputs = make_vocabulary_head(4, 3, 7, dtype=torch.float64, frozen=frozen)
    rows = torch.tensor([2, 0, 2, 2, 3])
    targets = torch.tensor([1, 6, 0, 1, 3])
    old = torch.full((5,), -2.0, dtype=torch.float64)

    def logprob(hidden, *weight):
        return linear_logprob(hidden, *(weight or (inputs.weight,)), targets, rows=rows, chunk_rows=2)

    def loss(hidden, *weight):
        return linear_ppo_loss(hidden, *(weight or (inputs.weight,)), targets, old, old + 2.5, rows=rows)[0]

    assert torch.autograd.gradcheck(logprob, inputs.leaves())
    assert torch.autograd.gradcheck(loss, inputs.leaves())


@pytest.mark.parametrize("device", DEVICES)
def test_sums_are_in_fp32_and_bit_equal_from_run_to_run(device):
    """A row used 300 times: bf16 sums would stop growing at 256, and atomics would differ from run to run."""
    dtype = torch.float32 if INTERPRETED else torch.bfloat16
    hidden = torch.zeros(5, 33, dtype=dtype, device=device, requires_grad=True)
    rows = torch.full((301,), 2, device=device)
    rows[7] = 4
    (ones,) = torch.autograd.grad(gather_rows(hidden, rows).sum(), hidden)
    assert ones[2].tolist() == [300.0] * 33
    assert ones[4].tolist() == [1.0] * 33
    assert not ones[[0, 1, 3]].any()
    incoming = torch.randn(301, 33, device=device).to(dtype)
    runs = [torch.autograd.grad(gather_rows(hidden, rows), hidden, incoming)[0] for _ in range(3)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])
    expected = torch.zeros(5, 33, dtype=torch.float64).index_add_(0, rows.cpu(), incoming.cpu().double())
    torch.testing.assert_close(runs[0].cpu(), expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@settings(max_examples=5 if INTERPRETED else 50, deadline=None)
@given(
    st.integers(1, 12), st.lists(st.integers(0, 11), max_size=90), st.sampled_from([1, 5, 131]), st.booleans(),
    st.integers(0, 999),
)  # fmt: skip
def test_any_rows(num_rows, rows, width, strided, seed):
    rows = torch.tensor([r % num_rows for r in rows], dtype=torch.int64)
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, width, generator=make).requires_grad_()
    incoming = torch.randn(len(rows), 2 * width, generator=make)[:, ::2]
    if not strided:
        incoming = incoming.contiguous()
    found = gather_rows(hidden, rows)
    assert torch.equal(found, hidden[rows])
    (gradient,) = torch.autograd.grad(found, hidden, incoming)
    expected = torch.zeros(num_rows, width).double().index_add_(0, rows, incoming.double())
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(INTERPRETED, reason="checks the registration, which the interpreter replaces")
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    hidden, rows = torch.randn(6, 4, device=device, requires_grad=True), torch.tensor([5, 1, 5], device=device)
    torch.library.opcheck(gather_rows, (hidden, rows))
    torch.library.opcheck(_add_rows, (hidden.detach()[:3], rows, 6))


def test_a_row_that_is_not_there_is_noticed():
    hidden, weight = torch.zeros(4, 3), torch.zeros(9, 3)
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        linear_logprob(hidden, weight, torch.zeros(1, dtype=torch.int64), rows=torch.tensor([4]))

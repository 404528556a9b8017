"""linear_logprob against float64, its products and memory, and everything it must refuse."""

import math

import pytest
import torch
from airl_kernels import linear_logprob
from airl_kernels.logprob import _linear_logprob, _linear_logprob_backward, scaled
from airl_kernels.testing import (
    INTERPRETED,
    VocabularyHead,
    assert_as_good_as,
    in_the_worst_order,
    make_vocabulary_head,
    peak_bytes,
    plain_log_softmax,
    plain_logprob,
    product_count,
    products,
    wide,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.airl_kernels.cases import DEVICES, DTYPES

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"temperature": 1.3, "softcap": 3.0, "logit_scale": 0.8},
}
# The small vocabulary is tried with everything, the large ones each with one choice of options.
CASES = [(17, option) for option in OPTIONS] + [(50257, "softcap"), (128256, "temperature"), (151936, "plain")]


def grads(outputs: torch.Tensor, inputs: VocabularyHead, weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad((outputs * weights.to(outputs)).sum(), inputs.leaves())


def ours(inputs: VocabularyHead, **options: object) -> torch.Tensor:
    return linear_logprob(inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, **options)


# ---- right -----------------------------------------------------------------------------------------------------


def labelled(compute, inputs: VocabularyHead, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """(log-probability, entropy) that `compute` makes of `inputs`, and the gradients of each and of both."""
    found = dict(zip(("log-probability", "entropy"), (x.detach() for x in compute(inputs)), strict=True))
    for name, use in (("log-probability", (1.0, 0.0)), ("entropy", (0.0, 1.0)), ("both", (1.0, 1.0))):
        logprob, entropy = compute(inputs)
        mixed = use[0] * logprob + use[1] * entropy * 0.3
        gradients = grads(mixed, inputs, use[0] * weights[0] + use[1] * weights[1])
        for tensor, gradient in zip(("hidden", "weight", "bias"), gradients, strict=False):
            found[f"gradient of {name} in {tensor}"] = gradient
    return found


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize(("vocab", "option"), CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_error_is_within_twice_that_of_careful_torch(device, dtype, vocab, option, frozen):
    options = OPTIONS[option]
    rows = (5 if INTERPRETED else 33) if vocab == 17 else 2 if INTERPRETED else 5
    inputs = make_vocabulary_head(rows, 16, vocab, dtype=dtype, device=device, bias=vocab in (17, 50257), frozen=frozen)
    weights = torch.randn(2, rows, generator=torch.Generator().manual_seed(1))
    found = labelled(lambda i: ours(i, entropy=True, chunk_rows=4, **options), inputs, weights)
    careful = in_the_worst_order(
        lambda: tuple(labelled(lambda i: plain_logprob(i, **options), inputs, weights).values())
    )
    truth = labelled(lambda i: plain_logprob(i, **options), wide(inputs), weights)
    for (what, a), b, c in zip(found.items(), careful, truth.values(), strict=True):
        assert a.dtype == (dtype if "gradient" in what else torch.float32)
        assert_as_good_as(a, b, c, what)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_gradcheck(frozen, options, entropy):
    inputs = make_vocabulary_head(5, 3, 7, dtype=torch.float64, bias=True, frozen=frozen)
    leaves = inputs.leaves()

    def run(*tensors):
        hidden, *rest = tensors
        weight, bias = rest or (inputs.weight, inputs.bias)
        return linear_logprob(
            hidden, weight, inputs.targets, bias=bias, entropy=entropy, chunk_rows=2, **options
        )  # fmt: skip

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("device", DEVICES)
def test_frozen_and_trainable_give_the_same_hidden_gradient(device):
    # The bias alone being trainable takes the recomputing path.
    frozen = make_vocabulary_head(9, 8, 31, device=device, bias=True, frozen=True)
    leaves = frozen.hidden.detach().clone().requires_grad_(), frozen.bias.clone().requires_grad_()
    half = VocabularyHead(leaves[0], frozen.weight, leaves[1], frozen.targets)
    weights = torch.randn(9)
    (expected,) = grads(ours(frozen), frozen, weights)
    found, d_bias = grads(ours(half), half, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    p = plain_log_softmax(half).exp()
    onehot = torch.nn.functional.one_hot(half.targets, 31)
    torch.testing.assert_close(d_bias, (weights.to(device)[:, None] * (onehot - p)).sum(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_select_and_their_gradient_returns_to_its_place(device):
    inputs = make_vocabulary_head(12, 8, 31, device=device)
    rows = torch.tensor([7, 0, 7, 11], device=device)  # a row may count twice
    targets = inputs.targets[:4]
    found = linear_logprob(inputs.hidden, inputs.weight, targets, rows=rows)
    picked = VocabularyHead(inputs.hidden[rows], inputs.weight, None, targets)
    expected, _ = plain_logprob(picked)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    found, expected = grads(found, inputs, weights), grads(expected, inputs, weights)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not found[0][[1, 2, 3, 4, 5, 6, 8, 9, 10]].any()


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device):
    base = make_vocabulary_head(10, 12, 40, device=device)
    hidden = base.hidden.detach()[::2, 1::2].requires_grad_()
    weight = base.weight.detach()[:, 1::2].T.contiguous().T.requires_grad_()
    targets = base.targets[::2]
    assert not hidden.is_contiguous()
    assert not weight.is_contiguous()
    assert not targets.is_contiguous()
    found = linear_logprob(hidden, weight, targets, chunk_rows=2)
    expected, _ = plain_logprob(VocabularyHead(hidden, weight, None, targets))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weights = torch.linspace(-1, 1, 10, device=device)[::2]
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight), weights), torch.autograd.grad(expected, (hidden, weight), weights),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("device", DEVICES)
def test_no_rows(device, frozen):
    inputs = make_vocabulary_head(0, 8, 31, device=device, bias=True, frozen=frozen)
    logprob, entropy = ours(inputs, entropy=True)
    assert logprob.shape == entropy.shape == (0,)
    for gradient, leaf in zip(torch.autograd.grad(logprob.sum(), inputs.leaves()), inputs.leaves(), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


# ---- products and memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="counts the products of the torch loop, which is the same")
@pytest.mark.parametrize("chunk_rows", [None, 32])
@pytest.mark.parametrize(
    ("mode", "count"), [("no gradient", 1), ("frozen", 2), ("trainable", 4), ("weight only", 3), ("frozen, entropy", 4)]
)
def test_number_of_products(mode, count, chunk_rows):
    rows, width, vocab = 96, 8, 500
    inputs = make_vocabulary_head(rows, width, vocab, frozen=mode.startswith("frozen"))

    def run():
        if mode == "no gradient":
            with torch.no_grad():
                return ours(inputs, chunk_rows=chunk_rows)
        hidden = inputs.hidden.detach() if mode == "weight only" else inputs.hidden
        out = linear_logprob(
            hidden, inputs.weight, inputs.targets, chunk_rows=chunk_rows, entropy=mode.endswith("entropy")
        )
        (out[0] + out[1] if isinstance(out, tuple) else out).sum().backward()
        return None

    assert product_count(run, rows, width, vocab) == count
    assert len(products(run)) == count * (1 if chunk_rows is None else 3)


@pytest.mark.skipif(INTERPRETED, reason="counts the products of the torch loop, which is the same")
def test_rows_keep_the_others_out_of_every_product():
    inputs = make_vocabulary_head(100, 8, 500)
    rows = torch.arange(0, 100, 10)
    seen = products(
        lambda: linear_logprob(inputs.hidden, inputs.weight, inputs.targets[:10], rows=rows).sum().backward()
    )
    assert sorted(seen) == sorted([(10, 8, 500), (10, 8, 500), (10, 500, 8), (500, 10, 8)])


@pytest.mark.skipif(INTERPRETED, reason="measures torch's own allocations")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_temporaries_do_not_grow_with_the_rows(frozen):
    def peak(rows):
        inputs = make_vocabulary_head(rows, 4, 4000, frozen=frozen)
        kept = rows * (4 + 4 * 4) * 4  # J or d hidden, and what is stored per row
        return peak_bytes(lambda: torch.autograd.grad(ours(inputs, chunk_rows=16).sum(), inputs.leaves())) - kept

    assert peak(256) < 1.1 * peak(128) < 5 * 16 * 4000 * 4


def test_chunks_change_nothing_but_rounding():
    inputs = make_vocabulary_head(50, 8, 300, bias=True)
    whole, parts = ours(inputs, chunk_rows=50), ours(inputs, chunk_rows=7)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    weights = torch.randn(50)
    for a, b in zip(grads(whole, inputs, weights), grads(parts, inputs, weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_weight_gradient_of_many_bf16_chunks_keeps_fp32_sums():
    if INTERPRETED:
        pytest.skip("bf16")
    rows = 512
    inputs = make_vocabulary_head(rows, 8, 64, dtype=torch.bfloat16, seed=3)
    exact = wide(inputs)
    weights = torch.ones(rows)
    truth = grads(plain_logprob(exact)[0], exact, weights)[1]
    many = grads(ours(inputs, chunk_rows=1), inputs, weights)[1]
    one = grads(ours(inputs, chunk_rows=rows), inputs, weights)[1]
    (careful,) = in_the_worst_order(lambda: grads(plain_logprob(inputs)[0], inputs, weights)[1:])
    assert_as_good_as(many, careful, truth, "gradient of weight over 512 chunks")
    assert (many == one).float().mean() > 0.98  # only a last bit may differ


@pytest.mark.parametrize("device", DEVICES)
def test_scaling_computes_wide_and_rounds_once(device):
    make = torch.Generator().manual_seed(0)
    matrix = torch.randn(5, 700, generator=make).to(device)
    matrix[3] = torch.inf
    factors = (torch.rand(5, generator=make) / 3).to(device)
    factors[3] = 0.0
    types = (torch.float32,) if INTERPRETED else (torch.float32, torch.bfloat16)
    for source in types:
        for result in types:
            x = matrix.to(source)
            by_row = torch.where(factors[:, None] == 0, 0.0, x.float() * factors[:, None]).to(result)
            torch.testing.assert_close(scaled(x, factors, result), by_row, rtol=0, atol=0)
            whole = (x[:3].float() * factors[0]).to(result)
            torch.testing.assert_close(scaled(x[:3], factors[0], result), whole, rtol=0, atol=0)
            torch.testing.assert_close(scaled(x[0], factors[0], result), whole[0], rtol=0, atol=0)


# ---- the machinery ---------------------------------------------------------------------------------------------


def op_inputs(bias: bool) -> tuple:
    inputs = make_vocabulary_head(6, 4, 11, bias=bias)
    return inputs.hidden, inputs.weight, inputs.targets, inputs.bias


@pytest.mark.skipif(INTERPRETED, reason="checks the registration, which the interpreter replaces")
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    mapping = (0.7, 5.0, 1.2)
    hidden, weight, targets, offsets = op_inputs(bias)
    for entropy, jacobian in ((False, False), (True, False), (False, True)):
        frozen = weight.detach() if jacobian else weight
        offset = None if offsets is None or not jacobian else offsets.detach()
        for layout in ((4, 11, False), (4, 9, True)):
            settings = mapping, entropy, jacobian, *layout
            torch.library.opcheck(_linear_logprob, (hidden, frozen, targets % 9, offset, *settings))
    detached = hidden.detach(), weight.detach(), targets, None if offsets is None else offsets.detach()
    logprob, entropy, row_max, log_sum, jac = _linear_logprob(*detached, mapping, True, True, 0, 11, False)
    for needs in ((True, True, bias), (False, True, False), (True, False, False)):
        torch.library.opcheck(
            _linear_logprob_backward,
            (logprob, entropy, *detached, row_max, log_sum, entropy, mapping, needs, 4, 11, False),
        )
    torch.library.opcheck(scaled, (jac, logprob, torch.float32))
    torch.library.opcheck(scaled, (jac, logprob.sum(), torch.bfloat16))


@pytest.mark.skipif(INTERPRETED, reason="the graph is the same")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_compiles_without_a_graph_break(frozen):
    inputs = make_vocabulary_head(8, 4, 11, frozen=frozen)

    def run(hidden, weight):
        logprob, entropy = linear_logprob(hidden, weight, inputs.targets[:4], rows=torch.arange(0, 8, 2), entropy=True,
                                          softcap=4.0)  # fmt: skip
        return (logprob * 2.0).sum() + (0.0 if frozen else 1.0) * entropy.detach().sum()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected, found = run(inputs.hidden, inputs.weight), compiled(inputs.hidden, inputs.weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, inputs.leaves()), torch.autograd.grad(expected, inputs.leaves())
    )


def test_second_derivatives_are_refused():
    for frozen in (False, True):
        inputs = make_vocabulary_head(4, 4, 11, frozen=frozen)
        (gradient,) = torch.autograd.grad(ours(inputs).exp().sum(), inputs.hidden, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            gradient.sum().backward()


# ---- properties ------------------------------------------------------------------------------------------------


EXAMPLES = 4 if INTERPRETED else 25


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(1, 9), width=st.integers(1, 9), vocab=st.integers(1, 30 if INTERPRETED else 200),
    chunk=st.integers(1, 9),
    temperature=st.floats(0.1, 10.0), spread=st.floats(0.0, 50.0), seed=st.integers(0, 999),
)  # fmt: skip
def test_probabilities_are_a_distribution(rows, width, vocab, chunk, temperature, spread, seed):
    inputs = make_vocabulary_head(rows, width, vocab, seed=seed, spread=spread)
    with torch.no_grad():
        columns = [
            linear_logprob(
                inputs.hidden, inputs.weight, torch.full((rows,), v), temperature=temperature, chunk_rows=chunk
            )
            for v in range(vocab)
        ]
        _, entropy = ours(inputs, temperature=temperature, entropy=True)
    logp = torch.stack(columns, 1)
    assert (logp <= 1e-6).all()
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(rows), rtol=1e-4, atol=1e-5)
    assert ((entropy >= -1e-4) & (entropy <= math.log(vocab) + 1e-4)).all()


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(1, 9), vocab=st.integers(2, 300), shift=st.floats(-100, 100), seed=st.integers(0, 999),
    temperature=st.floats(0.2, 5.0),
)  # fmt: skip
def test_a_constant_added_to_all_logits_changes_nothing(rows, vocab, shift, seed, temperature):
    inputs = make_vocabulary_head(rows, 4, vocab, seed=seed)
    with torch.no_grad():
        options = {"temperature": temperature}
        moved = linear_logprob(
            inputs.hidden, inputs.weight, inputs.targets, bias=torch.full((vocab,), shift), **options
        )
        torch.testing.assert_close(moved, ours(inputs, **options), rtol=1e-4, atol=1e-3 / temperature)


# ---- refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.nn.Linear(4, 11)}, TypeError, "must be a torch.Tensor"),
        ({"weight": torch.zeros(11, 4, dtype=torch.int8)}, TypeError, "quantised"),
        ({"weight": torch.zeros(11, 4, dtype=torch.bfloat16)}, TypeError, "weight must be torch.float32"),
        ({"weight": torch.zeros(11, 5)}, ValueError, "weight \\[V, H\\]"),
        ({"hidden": torch.zeros(2, 3, 4)}, ValueError, "hidden must have shape"),
        ({"hidden": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "hidden must have a floating dtype"),
        ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, "targets must have shape \\[6\\]"),
        ({"targets": torch.zeros(6, dtype=torch.int32)}, TypeError, "targets must be torch.int64"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have shape"),
        ({"rows": torch.zeros(6, dtype=torch.int32)}, TypeError, "rows must be torch.int64"),
        ({"rows": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, "rows must have shape"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0"),
        ({"softcap": -1.0}, ValueError, "softcap must be above 0"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must be above 0"),
        ({"chunk_rows": 0}, ValueError, "chunk_rows must be at least 1"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {
        "hidden": torch.zeros(6, 4),
        "weight": torch.zeros(11, 4),
        "targets": torch.zeros(6, dtype=torch.int64),
    }
    with pytest.raises(error, match=words):
        linear_logprob(**{**arguments, **change})


def test_a_tensor_subclass_such_as_dtensor_is_refused():
    from torch.testing._internal.two_tensor import TwoTensor

    weight = TwoTensor(torch.zeros(11, 4), torch.zeros(11, 4))
    with pytest.raises(TypeError, match="TwoTensor; pass a plain tensor"):
        linear_logprob(torch.zeros(6, 4), weight, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("target", [-1, 11])
def test_a_target_outside_the_vocabulary_is_noticed(target):
    arguments = torch.randn(2, 4), torch.randn(11, 4), torch.tensor([3, target])
    if INTERPRETED:
        assert linear_logprob(*arguments).isnan().tolist() == [False, True]
    else:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            linear_logprob(*arguments)

"""Budgets hold under every order of adding a product's terms, and still reject what is wrong.

The first half is the proof for processors that are not here: ours runs on products that add in hostile, legal orders.
The second plants faults in the reference, and each must exceed the budget.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache

import numpy as np
import pytest
import torch
from airl_kernels import group_advantages, linear_logprob, linear_ppo_loss, logprob
from airl_kernels.testing import (
    INTERPRETED,
    WorstProducts,
    assert_as_careful,
    assert_as_good_as,
    errors,
    expected_advantages,
    in_the_worst_order,
    make_policy_tokens,
    make_vocabulary_head,
    normal,
    offsets,
    plain_logprob,
    plain_loss,
    wide,
)

from tests import product_orders
from tests.airl_kernels.test_logprob import labelled
from tests.product_orders import ORDERS, product, products_in_order

pytestmark = pytest.mark.skipif(INTERPRETED, reason="plants its orders and faults in the torch loop")
VOCABULARIES = (300, 50257, 151936)
ROWS, WIDTH = 5, 16
MAPPING = {"temperature": 0.7, "softcap": 8.0}
Results = dict[str, torch.Tensor]


# ---- the orders themselves -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_product_adds_in_its_order(order):
    left, right = torch.randn(2, 41), torch.randn(41, 3)
    terms = left.numpy()[:, :, None] * right.numpy()[None]

    def chain(indices) -> np.ndarray:
        total = np.zeros((2, 3), np.float32)
        for k in indices:
            total = total + terms[:, k]
        return total

    expected = {
        "forwards": lambda: chain(range(41)),
        "backwards": lambda: chain(range(40, -1, -1)),
        "halves": lambda: chain(range(20)) + chain(range(20, 41)),
    }[order]()
    with products_in_order(order):
        assert np.array_equal((left @ right).numpy(), expected)
    assert np.array_equal(product(left, right, order).numpy(), expected)


def test_every_kind_of_product_changes_and_changes_back():
    left, right, bias = torch.randn(3, 4, 500), torch.randn(3, 500, 6), torch.randn(6)

    def run() -> list[torch.Tensor]:
        a, b, out = left[0], right[0], torch.empty(4, 6)
        torch.mm(a, b, out=out)
        scaled = torch.ones(4, 6).addmm_(a, b, beta=0.5, alpha=2.0)
        garbage = torch.addmm(torch.full((4, 6), torch.nan), a, b, beta=0)
        return [a @ b, left @ right, a @ b[:, 0], a[0] @ b[:, 0], torch.addmm(bias, a, b), out, scaled, garbage,
                torch.nn.functional.linear(a, b.T.contiguous(), bias)]  # fmt: skip

    plain = run()
    with products_in_order("backwards"):
        changed = run()
    for before, during, after in zip(plain, changed, run(), strict=True):
        torch.testing.assert_close(during, before, rtol=1e-4, atol=1e-4)
        assert not torch.equal(during, before)
        assert torch.equal(after, before)


def test_worst_products_err_as_the_theory_says_and_alike_everywhere():
    left, right = torch.randn(40, 3000), torch.randn(3000, 30)
    with WorstProducts(1) as products:
        first = left @ right
    with WorstProducts(1), products_in_order("halves"):
        torch.testing.assert_close(left @ right, first, rtol=0, atol=0)  # owes nothing to the library
        assert torch.equal(left.double() @ right.double(), left.double() @ right.double())
    assert products.used
    exact = left.double() @ right.double()
    size = 3 * 2**-24 * 3000**0.5 * (exact.square() + left.double().square() @ right.double().square()).sqrt()
    assert ((first - exact) / size).square().mean().sqrt().item() == pytest.approx(1.0, rel=0.05)
    (once,) = in_the_worst_order(lambda: (left.exp(),))
    assert once.shape == (1, 40, 3000)


# ---- ours, as the tests of the ops judge it --------------------------------------------------------------------


def log_probabilities(leaves, compute) -> Results:
    weights = torch.randn(2, ROWS, generator=torch.Generator().manual_seed(1))
    return labelled(lambda i: compute(i, **MAPPING), leaves, weights)


def fused_logprob(leaves, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return linear_logprob(
        leaves.hidden, leaves.weight, leaves.targets, bias=leaves.bias, entropy=True, chunk_rows=3, **options
    )


@cache
def problem(vocab: int):
    """(inputs, careful, truth, tokens of the policy's loss): what does not depend on the version that is judged."""
    inputs = make_vocabulary_head(ROWS, WIDTH, vocab, bias=True)
    exact = wide(inputs)
    tokens = make_policy_tokens(plain_logprob(exact, **MAPPING)[0], (3, 2), masked=False)
    names = list(plain(exact, tokens))
    careful = in_the_worst_order(lambda: tuple(plain(inputs, tokens).values()))
    return inputs, dict(zip(names, careful, strict=True)), plain(exact, tokens), tokens


def plain(leaves, tokens) -> Results:
    value = plain_loss(plain_logprob(leaves, **MAPPING)[0], tokens, "ppo")
    return log_probabilities(leaves, plain_logprob) | losses(value, leaves)


def losses(value: torch.Tensor, leaves) -> Results:
    gradients = torch.autograd.grad(value, leaves.leaves())
    return {f"loss's gradient in {n}": g for n, g in zip(("hidden", "weight", "bias"), gradients, strict=True)}


def ours(vocab: int) -> Results:
    inputs, _, _, tokens = problem(vocab)
    loss, _ = linear_ppo_loss(
        inputs.hidden, inputs.weight, inputs.targets, bias=inputs.bias, chunk_rows=3,
        **tokens.arguments(torch.float32, "cpu"), **MAPPING,
    )  # fmt: skip
    return log_probabilities(inputs, fused_logprob) | losses(loss, inputs)


def beyond_budget(vocab: int) -> list[str]:
    """The results of ours that the budget rejects."""
    _, careful, truth, _ = problem(vocab)
    rejected = []
    for what, value in ours(vocab).items():
        # A slope is the exponential of a log-probability, whose last bit is an error of its size.
        scale = truth["log-probability"].abs().max().item() * truth[what].abs().max().item() if "loss" in what else 0
        try:
            assert_as_good_as(value, careful[what], truth[what], what, scale)
        except AssertionError:
            rejected.append(what)
    return rejected


@pytest.mark.parametrize("order", ["as the library likes", *ORDERS])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_budget_accepts_every_legal_order(vocab, order):
    problem(vocab)  # under the library's own: careful and truth do not depend on it
    with ExitStack() as stack:
        if order in ORDERS:
            stack.enter_context(products_in_order(order))
        assert beyond_budget(vocab) == []


def _in_blocks(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """As a library adds at its best: short chains, and a chain of their sums."""
    return sum(ORDERS["forwards"](left[:, k : k + 64], right[k : k + 64]) for k in range(0, left.shape[1], 64))


def test_the_orders_are_hostile(monkeypatch):
    """Or the test above would prove nothing: twice the error of a good order is far too little."""
    inputs, _, truth, tokens = problem(151936)
    what, found = "gradient of log-probability in hidden", {}
    monkeypatch.setitem(product_orders.ORDERS, "blocks", _in_blocks)
    for order in ("blocks", "backwards"):
        with products_in_order(order):
            found[order] = errors(plain(inputs, tokens)[what], truth[what])[0]
    assert found["backwards"] > 4 * found["blocks"], found


# ---- planted faults --------------------------------------------------------------------------------------------


def _after(name: str, change: Callable) -> Callable:
    """Reference.`name`, then `change(logits, …)` of what it wrote."""
    right = getattr(logprob.Reference, name)

    def wrong(logits, *rest):
        right(logits, *rest)
        change(logits, *rest)

    return wrong


def _before(name: str, change: Callable) -> Callable:
    """Reference.`name` of arguments that `change` returns."""
    right = getattr(logprob.Reference, name)
    return lambda *arguments: right(*change(*arguments))


def _warmer(logits, targets, mapping, *rest):
    return logits, targets, mapping._replace(temperature=mapping.temperature * 1.01), *rest


def _without_tail(columns: int) -> Callable:
    def change(logits, *rest):
        logits[:, -columns:] = -torch.inf  # the target of one row is the last column
        return logits, *rest

    return change


def _negated_entropy(logits, targets, mapping, row_max, log_sum, entropy, grad_logprob, grad_entropy, *rest):
    opposite = None if grad_entropy is None else -grad_entropy
    return logits, targets, mapping, row_max, log_sum, entropy, grad_logprob, opposite, *rest


def _negated(logits, *_rest):
    logits.neg_()


def _in_bfloat16(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A product whose running sum is kept in bfloat16 between blocks of 64 terms."""
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.bfloat16)
    for start in range(0, left.shape[1], 64):
        part = slice(start, start + 64)
        total = (total.float() + torch.from_numpy(left[:, part] @ right[part])).bfloat16()
    return total.float().numpy()


FAULTS: dict[str, tuple[str, Callable[[], Callable]]] = {
    "temperature off by 1%": ("row_stats", lambda: _before("row_stats", _warmer)),
    "temperature of the gradient off by 1%": ("logit_gradient_", lambda: _before("logit_gradient_", _warmer)),
    "gradient's constant off by 0.5%": (
        "logit_gradient_", lambda: _after("logit_gradient_", lambda logits, *_: logits.mul_(1.005))
    ),
    "a row of the gradient lost": (
        "logit_gradient_", lambda: _after("logit_gradient_", lambda logits, *_: logits[-1].zero_())
    ),
    "the last column lost": ("row_stats", lambda: _before("row_stats", _without_tail(1))),
    "the last tile of columns lost": ("row_stats", lambda: _before("row_stats", _without_tail(64))),
    "the last column's gradient lost": (
        "logit_gradient_", lambda: _after("logit_gradient_", lambda logits, *_: logits[:, -1].zero_())
    ),
    "the sign of the gradient": ("logit_gradient_", lambda: _after("logit_gradient_", _negated)),
    "the sign of the entropy's gradient": ("logit_gradient_", lambda: _before("logit_gradient_", _negated_entropy)),
    "gradient rounded to bfloat16": (
        "logit_gradient_",
        lambda: _after("logit_gradient_", lambda logits, *_: logits.copy_(logits.bfloat16())),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_budget_rejects_a_planted_fault(vocab, fault, monkeypatch):
    problem(vocab)
    name, make = FAULTS[fault]
    monkeypatch.setattr(logprob.Reference, name, staticmethod(make()))
    rejected = beyond_budget(vocab)
    where = "gradient" if name == "logit_gradient_" else "log-probability"
    assert any(where in what for what in rejected), rejected


@contextmanager
def bfloat16_sums(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(product_orders.ORDERS, "bfloat16", _in_bfloat16)
    with products_in_order("bfloat16"):
        yield


@pytest.mark.parametrize("vocab", [50257, 151936])
def test_the_budget_rejects_sums_in_bfloat16(vocab, monkeypatch):
    problem(vocab)
    with bfloat16_sums(monkeypatch):
        rejected = beyond_budget(vocab)
    assert "gradient of log-probability in hidden" in rejected
    assert "loss's gradient in hidden" in rejected


@pytest.mark.parametrize("baseline", ["last_token", "all_tokens", "leave_one_out"])
def test_the_budget_rejects_a_missing_group_member(baseline):
    lengths, group = [5, 9, 3, 7], [0, 0, 0, 0]
    rewards = normal(sum(lengths), 0)
    exact = torch.tensor(
        expected_advantages(rewards.double(), lengths, group, 0.9, baseline, 1e-6, 0.0), dtype=torch.float64
    )
    for labels in ([0, 0, 0, 0], [0, 0, 0, 1]):
        found = group_advantages(rewards, offsets(lengths), torch.tensor(labels), 0.9, baseline=baseline)
        kept = slice(0, sum(lengths[:3]))  # of the members that both have
        verdict = pytest.raises(AssertionError) if labels[-1] else ExitStack()
        with verdict:
            assert_as_careful(found[kept], exact[kept].float(), exact[kept], slack=8.0)

"""linear_logprob where logits are infinite, undefined or very large."""

import math

import pytest
import torch
from airl_kernels import linear_logprob
from airl_kernels.testing import make_vocabulary_head

from tests.airl_kernels.cases import DEVICES


def through_bias(logits: torch.Tensor, targets: list[int], frozen: bool = False, **options) -> tuple:
    """(log p, entropy, gradient of Σ log p in the logits) for exactly these logits, made by a bias and hidden 0."""
    rows, vocab = logits.shape
    hidden = torch.eye(rows, device=logits.device).requires_grad_()
    weight = torch.zeros(vocab, rows, device=logits.device)
    weight.copy_(torch.where(logits.isfinite(), logits, 0.0).T)
    # One row may have infinities: as a bias they would reach every row, so such cases come one row at a time.
    bias = torch.where(logits.isfinite(), 0.0, logits).sum(0) if rows == 1 else torch.zeros(vocab).to(logits)
    bias.requires_grad_(not frozen)
    logprob, entropy = linear_logprob(
        hidden, weight, torch.tensor(targets, device=logits.device), bias=bias, entropy=True, **options
    )
    gradient = None if frozen else torch.autograd.grad(logprob.sum(), bias)[0]
    return logprob, entropy, gradient


@pytest.mark.parametrize("device", DEVICES)
def test_minus_infinity_is_a_token_that_cannot_occur(device):
    logits = torch.tensor([[1.0, -math.inf, 2.0, -math.inf, 0.5]], device=device)
    logprob, entropy, gradient = through_bias(logits, [2])
    expected = torch.log_softmax(logits[0, [0, 2, 4]].double(), 0)
    assert logprob.item() == pytest.approx(expected[1].item(), rel=1e-6)
    assert entropy.item() == pytest.approx(-(expected.exp() * expected).sum().item(), rel=1e-6)
    assert gradient[[1, 3]].tolist() == [0.0, 0.0]
    assert gradient[[0, 4]].tolist() == pytest.approx((-expected.exp()[[0, 2]]).tolist(), rel=1e-6)
    impossible, _, gradient = through_bias(logits, [1])
    assert impossible.item() == -math.inf
    assert gradient.isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_whole_tiles_of_minus_infinity(device):
    logits = torch.full((1, 9001), -math.inf, device=device)
    logits[0, 8500:8503] = torch.tensor([0.0, 1.0, 2.0], device=device)
    logprob, entropy, gradient = through_bias(logits, [8501])
    expected = torch.log_softmax(torch.arange(3.0), 0)
    assert logprob.item() == pytest.approx(expected[1].item(), rel=1e-6)
    assert entropy.item() == pytest.approx(-(expected.exp() * expected).sum().item(), rel=1e-6)
    assert gradient.isfinite().all()
    assert gradient.abs().sum().item() == pytest.approx(2 * (1 - math.exp(expected[1])))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("device", DEVICES)
def test_infinity_and_nan_give_nan_as_in_torch(device, bad):
    logits = torch.tensor([[1.0, bad, 2.0]], device=device)
    logprob, entropy, _ = through_bias(logits, [0])
    assert torch.log_softmax(logits, -1).isnan().all()
    assert logprob.isnan().all()
    assert entropy.isnan().all()


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_bad_row_stays_alone_and_its_zero_gradient_stays_zero(device, frozen):
    inputs = make_vocabulary_head(4, 8, 31, device=device, frozen=frozen)
    with torch.no_grad():
        inputs.hidden[2] = math.inf
    logprob = linear_logprob(inputs.hidden, inputs.weight, inputs.targets)
    assert logprob.isfinite().tolist() == [True, True, False, True]
    (gradient,) = torch.autograd.grad(logprob, inputs.hidden, torch.tensor([1.0, 1.0, 0.0, 1.0], device=device))
    assert gradient.isfinite().all()
    assert not gradient[2].any()
    assert gradient[[0, 1, 3]].any(1).all()


@pytest.mark.parametrize("level", [1e4, 1e6, 1e30])
@pytest.mark.parametrize("device", DEVICES)
def test_large_logits_lose_nothing(device, level):
    steps = torch.tensor([0.0, -1.0, 2.0, 0.5], dtype=torch.float64) * max(1.0, level * 2.0**-20)
    logits = (level + steps).float()[None]
    logprob, entropy, gradient = through_bias(logits.to(device), [0])
    exact = torch.log_softmax(logits.double(), -1)[0]
    assert logprob.item() == pytest.approx(exact[0].item(), rel=2e-6)
    assert entropy.item() == pytest.approx(-(exact.exp() * exact.clamp(min=-1e9)).sum().item(), rel=2e-6, abs=1e-12)
    onehot = torch.tensor([1.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(gradient.cpu(), (onehot - exact.exp()).float(), rtol=2e-6, atol=1e-7)

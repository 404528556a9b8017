"""selective_log_softmax against float64, strides, and the backward pass that overwrites the logits."""

import pytest
import torch
from airl_kernels import selective_log_softmax
from airl_kernels.selective import _selective, _selective_backward_
from airl_kernels.testing import INTERPRETED, assert_as_good_as, peak_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.airl_kernels.cases import DEVICES, DTYPES


def case(rows: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(parameter whose double are the logits, targets, incoming gradient)."""
    make = torch.Generator().manual_seed(vocab)
    parameter = (torch.randn(rows, vocab, generator=make) * 3).to(device, dtype).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=make).to(device)
    return parameter, targets, torch.randn(rows, generator=make).to(device)


@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("vocab", [17, 50257, 128256, 151936])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_error_is_within_twice_that_of_careful_torch(device, dtype, vocab, temperature, inplace):
    parameter, targets, weights = case(21 if vocab == 17 else 2, vocab, dtype, device)
    exact = parameter.detach().cpu().double().requires_grad_()

    def careful(logits):
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(wide / temperature, -1).gather(1, targets.to(logits.device)[:, None])[:, 0]

    found = selective_log_softmax(2 * parameter, targets, temperature=temperature, inplace_backward=inplace)
    expected, truth = careful(2 * parameter), careful(2 * exact)
    assert_as_good_as(found, expected, truth, "log-probability")
    gradients = [
        torch.autograd.grad(out, leaf, weights.to(out))[0]
        for out, leaf in ((found, parameter), (expected, parameter), (truth, exact))
    ]
    assert gradients[0].dtype == dtype
    assert_as_good_as(*gradients, "gradient")


@pytest.mark.parametrize("device", DEVICES)
def test_inplace_backward_returns_the_logits_own_memory(device):
    parameter, targets, weights = case(5, 300, torch.float32, device)
    logits = 2 * parameter
    logprob = selective_log_softmax(logits, targets, inplace_backward=True)
    (gradient,) = torch.autograd.grad(logprob, logits, weights)
    assert gradient.data_ptr() == logits.data_ptr()
    logits = 2 * parameter
    (fresh,) = torch.autograd.grad(selective_log_softmax(logits, targets), logits, weights)
    assert fresh.data_ptr() != logits.data_ptr()
    torch.testing.assert_close(gradient, fresh, rtol=0, atol=0)
    torch.testing.assert_close(logits, 2 * parameter)


def test_inplace_backward_is_refused_where_it_would_corrupt():
    parameter, targets, _ = case(5, 30, torch.float32, "cpu")
    with pytest.raises(ValueError, match="leaf"):
        selective_log_softmax(parameter, targets, inplace_backward=True)
    logits = (2 * parameter).exp()  # exp saved its result
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        selective_log_softmax(logits, targets, inplace_backward=True).sum().backward()
    logits = 2 * parameter
    logprob = selective_log_softmax(logits, targets, inplace_backward=True).sum()
    logprob.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logprob.backward()


@pytest.mark.skipif(INTERPRETED, reason="measures torch's own allocations")
def test_inplace_backward_saves_a_tensor_of_logits_size():
    parameter, targets, weights = case(64, 5000, torch.float32, "cpu")

    def peak(inplace):
        def graph():
            logits = parameter * 1
            return logits, selective_log_softmax(logits, targets, inplace_backward=inplace)

        graphs = [graph(), graph()]  # `peak_bytes` runs twice
        return peak_bytes(lambda: torch.autograd.grad(*reversed(graphs.pop()), weights))

    assert peak(False) - peak(True) == pytest.approx(64 * 5000 * 4, rel=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_and_leading_dimensions(device):
    make = torch.Generator().manual_seed(0)
    base = torch.randn(2, 5, 40, generator=make).to(device)
    targets = torch.randint(20, (2, 5), generator=make).to(device)
    for logits in (base[..., :20], base[..., ::2], base.transpose(0, 1)[..., :20].transpose(0, 1), base[..., 20:]):
        logits = logits.detach().requires_grad_()
        expected = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
        found = selective_log_softmax(logits, targets)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert found.shape == (2, 5)
        weights = torch.randn(5, 2, generator=make).to(device).T
        torch.testing.assert_close(
            torch.autograd.grad(found, logits, weights), torch.autograd.grad(expected, logits, weights),
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip


@settings(max_examples=5 if INTERPRETED else 40, deadline=None)
@given(
    rows=st.integers(1, 9), vocab=st.integers(1, 700), temperature=st.floats(0.1, 10), spread=st.floats(0, 50),
    inplace=st.booleans(), seed=st.integers(0, 999),
)  # fmt: skip
def test_any_shape_matches_log_softmax(rows, vocab, temperature, spread, inplace, seed):
    make = torch.Generator().manual_seed(seed)
    parameter = (torch.randn(rows, vocab, generator=make) * spread).requires_grad_()
    exact = parameter.detach().double().requires_grad_()
    targets, weights = torch.randint(vocab, (rows,), generator=make), torch.randn(rows, generator=make)
    found = selective_log_softmax(parameter * 1, targets, temperature=temperature, inplace_backward=inplace)
    truth = torch.log_softmax(exact / temperature, -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5 * max(1.0, spread / temperature))
    (mine,), (theirs,) = (
        torch.autograd.grad(found, parameter, weights),
        torch.autograd.grad(truth, exact, weights.double()),
    )
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-3, atol=1e-4 / temperature)


def test_single_row_and_no_rows():
    one = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    logprob = selective_log_softmax(one, torch.tensor(2))
    torch.testing.assert_close(logprob, torch.log_softmax(one, -1)[2])
    none = torch.zeros(0, 7, requires_grad=True)
    assert torch.autograd.grad(selective_log_softmax(none, torch.zeros(0, dtype=torch.int64)).sum(), none)[0].shape == (
        0,
        7,
    )


def test_gradcheck_opcheck_and_compile():
    make = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, generator=make, dtype=torch.float64).requires_grad_()
    targets = torch.randint(9, (4,), generator=make)
    assert torch.autograd.gradcheck(lambda x: selective_log_softmax(x, targets, temperature=0.8), logits)
    single = logits.detach().float().requires_grad_()
    if not INTERPRETED:
        torch.library.opcheck(_selective, (single, targets, 0.7, False))
        logprob, row_max, log_sum = _selective(single.detach(), targets, 0.7, False)
        torch.library.opcheck(
            _selective_backward_, (single.detach().clone(), targets, row_max, log_sum, logprob.clone(), 0.7)
        )
    run = torch.compile(
        lambda x: selective_log_softmax(x * 2, targets, inplace_backward=True).sum(), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    expected = torch.log_softmax(single * 2, -1).gather(1, targets[:, None]).sum()
    torch.testing.assert_close(run(single), expected)
    torch.testing.assert_close(torch.autograd.grad(run(single), single), torch.autograd.grad(expected, single))


@pytest.mark.parametrize(
    ("logits", "targets", "error", "words"),
    [
        (
            torch.zeros(3, 4, dtype=torch.int64),
            torch.zeros(3, dtype=torch.int64),
            TypeError,
            "logits must have a floating",
        ),
        (torch.zeros(3, 4), torch.zeros(3), TypeError, "targets must be torch.int64"),
        (torch.zeros(3, 4), torch.zeros(4, dtype=torch.int64), ValueError, "without its last dimension, \\[3\\]"),
    ],
)
def test_bad_arguments_are_named(logits, targets, error, words):
    with pytest.raises(error, match=words):
        selective_log_softmax(logits, targets)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        selective_log_softmax(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), temperature=-1.0)

"""Heads inside autocast: what it does to a linear layer, and a weight gradient that it does not round."""

from contextlib import contextmanager

import pytest
import torch
from airl_kernels import discriminator_loss, linear_logprob, linear_ppo_loss, token_rewards
from airl_kernels.logprob import check_head
from airl_kernels.testing import (
    INTERPRETED,
    VocabularyHead,
    assert_as_good_as,
    make_policy_tokens,
    make_token_head,
    make_vocabulary_head,
    plain_logprob,
    plain_loss,
    rms_error,
    token_logits,
    wide,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.airl_kernels.cases import DEVICES

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MIXES = [  # of hidden, weight and bias
    ("float32", "float32", "float32"),
    ("bfloat16", "float32", "float32"),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "float32", "bfloat16"),
]
LENGTHS = (20, 0, 13)
# Triton's interpreter multiplies bfloat16 as torch does on the CPU: the products are torch's there too.


def mixed_head(mix: tuple[str, str, str], device: str, frozen: bool = False) -> tuple[VocabularyHead, VocabularyHead]:
    """A head of these types, and the numbers that its products see, in float64."""
    inputs = make_vocabulary_head(sum(LENGTHS), 16, 130, device=device, bias=True)
    places = zip((inputs.hidden, inputs.weight, inputs.bias), mix, (True, not frozen, not frozen), strict=True)
    tensors = [t.detach().to(FLOATS[name]).requires_grad_(needed) for t, name, needed in places]
    head = VocabularyHead(*tensors, inputs.targets)
    rounded = [t.detach().bfloat16().requires_grad_(t.requires_grad) for t in tensors]
    return head, wide(VocabularyHead(*rounded, inputs.targets))


def by_linear(head: VocabularyHead) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies) of torch's own layer inside autocast."""
    logits = torch.nn.functional.linear(head.hidden, head.weight, head.bias)
    assert logits.dtype == torch.bfloat16
    logp = torch.log_softmax(logits.float(), -1)
    return logp.gather(1, head.targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def assert_gradients(ours, careful, truth, head: VocabularyHead) -> None:
    """In the types of the tensors, as good as the layer's; where those are float32 the weight's keeps its digits."""
    named = [(n, t) for n in ("hidden", "weight", "bias") if (t := getattr(head, n)).requires_grad]
    for (name, tensor), a, b, c in zip(named, ours, careful, truth, strict=True):
        assert a.dtype == tensor.dtype
        assert_as_good_as(a, b, c, f"gradient in {name}")


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize("device", DEVICES)
def test_linear_logprob_is_as_good_as_a_linear_layer(device, mix, frozen):
    head, exact = mixed_head(mix, device, frozen)
    upstream = torch.randn(sum(LENGTHS), generator=torch.Generator().manual_seed(1)).to(device)
    truth, truth_entropy = plain_logprob(exact)
    with torch.autocast(device, torch.bfloat16):
        careful, careful_entropy = by_linear(head)
        found, entropy = linear_logprob(
            head.hidden, head.weight, head.targets, bias=head.bias, entropy=True, chunk_rows=12
        )
    assert found.dtype == torch.float32
    assert_as_good_as(found, careful, truth.to(device), "log-probability")
    assert_as_good_as(entropy, careful_entropy, truth_entropy.to(device), "entropy")
    gradients = [
        torch.autograd.grad((value * upstream.to(value)).sum(), leaves.leaves())
        for value, leaves in ((found, head), (careful, head), (truth, exact))
    ]
    assert_gradients(*gradients, head)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("mix", MIXES, ids="-".join)
@pytest.mark.parametrize("device", DEVICES)
def test_linear_ppo_loss_is_as_good_as_a_linear_layer(device, mix, frozen):
    head, exact = mixed_head(mix, device, frozen)
    truth_logprob, _ = plain_logprob(exact)
    case = make_policy_tokens(truth_logprob, LENGTHS)
    # Ratios far from the bounds, so that rounding moves no token across one.
    shift = torch.tensor([0.0, 0.5, -0.5]).repeat(sum(LENGTHS) // 3)
    case.old_logprobs.copy_(truth_logprob.detach().cpu() - shift)
    truth = plain_loss(truth_logprob.cpu(), case, "ppo")
    arguments = case.arguments(torch.float32, device)
    for compact in (False, True):
        with torch.autocast(device, torch.bfloat16):
            careful = plain_loss(by_linear(head)[0].cpu(), case, "ppo")
            loss, _ = linear_ppo_loss(
                head.hidden, head.weight, head.targets, bias=head.bias, **arguments, compact=compact, chunk_rows=12
            )
        assert_as_good_as(loss.cpu(), careful.float(), truth, "loss", scale=1.0)
        gradients = [
            torch.autograd.grad(value, leaves.leaves(), retain_graph=True)
            for value, leaves in ((loss, head), (careful, head), (truth, exact))
        ]
        assert_gradients(*gradients, head)


@pytest.mark.parametrize("device", DEVICES)
def test_the_weights_gradient_is_not_rounded(device):
    """Only the gradient of the logits is, before its product: over many vocabulary entries the layer's own gradient,
    rounded to bfloat16 on its way to float32, errs more."""
    head, exact = mixed_head(("bfloat16", "float32", "float32"), device)
    truth = torch.autograd.grad(plain_logprob(exact)[0].sum(), exact.weight)[0]
    with torch.autocast(device, torch.bfloat16):
        layer = torch.autograd.grad(by_linear(head)[0].sum(), head.weight)[0]
        ours = torch.autograd.grad(linear_logprob(head.hidden, head.weight, head.targets, bias=head.bias).sum(),
                                   head.weight)[0]  # fmt: skip
    assert torch.equal(layer, layer.bfloat16().float())
    assert not torch.equal(ours, ours.bfloat16().float())
    assert rms_error(ours, truth) < rms_error(layer, truth)


@pytest.mark.parametrize("device", DEVICES)
def test_values_are_those_of_tensors_cast_before(device):
    head, _ = mixed_head(("bfloat16", "float32", "float32"), device)
    cast = [t.bfloat16() for t in (head.hidden, head.weight, head.bias)]
    expected = linear_logprob(cast[0], cast[1], head.targets, bias=cast[2])
    with torch.autocast(device, torch.bfloat16):
        for rows in (None, torch.arange(len(head.targets), device=device)):
            found = linear_logprob(head.hidden, head.weight, head.targets, bias=head.bias, rows=rows)
            assert torch.equal(found, expected)


def test_outside_autocast_mixed_types_are_refused():
    head, _ = mixed_head(("bfloat16", "float32", "float32"), "cpu")
    ones = torch.ones(len(head.targets))
    for call in (
        lambda: linear_logprob(head.hidden, head.weight, head.targets),
        lambda: linear_ppo_loss(head.hidden, head.weight, head.targets, None, ones),
    ):
        with pytest.raises(TypeError, match=r"weight must be torch\.bfloat16, got torch\.float32"):
            call()
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False), pytest.raises(TypeError):
            call()


def test_autocast_leaves_float64_alone():
    """As it does for torch's layers; and half of a head in float64 is a mistake inside it as outside."""
    inputs = make_vocabulary_head(6, 4, 11, dtype=torch.float64)
    expected = linear_logprob(inputs.hidden, inputs.weight, inputs.targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_logprob(inputs.hidden, inputs.weight, inputs.targets), expected)
        with pytest.raises(TypeError, match=r"weight must be torch\.float64, got torch\.float32"):
            linear_logprob(inputs.hidden, inputs.weight.float(), inputs.targets)
        with pytest.raises(TypeError, match=r"weight must be .*torch\.float32, got torch\.float64"):
            linear_logprob(inputs.hidden.float(), inputs.weight, inputs.targets)


# ---- the token head --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [None, 7], ids=["linear", "action"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_token_head_takes_any_types_and_rounds_nothing(device, dtype, vocabulary):
    """One column per token is no product for tensor cores: it is summed in float32 from what is there, which is
    nearer to the exact numbers than the layer's bfloat16. Gradients have the types of their tensors."""
    head = make_token_head(40, 32, vocabulary=vocabulary, device=device)
    hidden = head.hidden.detach().to(dtype).requires_grad_()
    exact = make_token_head(40, 32, vocabulary=vocabulary, dtype=torch.float64, device=device)
    exact.hidden.data.copy_(hidden.detach().double())
    truth = token_logits(exact)
    with torch.autocast(device, torch.bfloat16):
        rewards = token_rewards(hidden, head.weight, head.bias, index=head.index)
        loss, logits = discriminator_loss(
            hidden, head.weight, head.bias, head.targets, head.weights, index=head.index
        )  # fmt: skip
        grads = torch.autograd.grad(loss, (hidden, head.weight))
    assert rewards.dtype == logits.dtype == torch.float32
    bound = 40 * torch.finfo(torch.float32).eps * truth.abs().max().item()
    assert (rewards - truth).abs().max().item() <= bound
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    outside, _ = discriminator_loss(hidden, head.weight, head.bias, head.targets, head.weights, index=head.index)
    assert all(map(torch.equal, grads, torch.autograd.grad(outside, (hidden, head.weight))))


# ---- machinery -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="the graph is the same")
def test_compiles_without_a_graph_break():
    head, _ = mixed_head(("bfloat16", "float32", "float32"), "cpu")
    leaves = (head.hidden, head.weight, head.bias)

    def run(hidden, weight, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_logprob(hidden, weight, head.targets, bias=bias).sum()

    expected, found = run(*leaves), torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))


@contextmanager
def cuda_autocast():
    """`torch.autocast("cuda")` turns itself off on a machine without a GPU; what it would have set, set."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


@pytest.mark.skipif(INTERPRETED, reason="asks about shapes and types alone")
def test_cuda_tensors_follow_the_autocast_of_their_device():
    """Types through fake tensors: autocast of the CPU says nothing about them, that of CUDA does."""
    with FakeTensorMode(), torch.no_grad():
        hidden, weight = torch.empty(6, 8, dtype=torch.bfloat16, device="cuda"), torch.empty(20, 8, device="cuda")
        targets, ones = torch.empty(6, dtype=torch.int64, device="cuda"), torch.empty(6, device="cuda")
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match="weight must be"):
            linear_logprob(hidden, weight, targets)
        with cuda_autocast():
            found = linear_logprob(hidden, weight, targets)
            loss, _ = linear_ppo_loss(hidden, weight, targets, None, ones)
            assert check_head(hidden.float(), weight, None, targets, None).dtype == torch.bfloat16
        assert found.dtype == loss.dtype == torch.float32
        assert found.device.type == loss.device.type == "cuda"

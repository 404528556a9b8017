"""The token head in autograd, torch.library and torch.compile: what a backward pass costs, keeps and repeats."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from airl_kernels import token_rewards
from airl_kernels.testing import (
    INTERPRETED,
)
from torch.autograd import grad, gradcheck

from tests.airl_kernels.head import KINDS, LOSSES, devices, loss_of, make_head, not_a_kernel

# ---- autograd --------------------------------------------------------------------------------------------------


@not_a_kernel
@pytest.mark.parametrize("vocabulary", [None, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_rewards(kind, vocabulary):
    head = make_head(rows=9, width=4, vocabulary=vocabulary, bias=vocabulary or 1, offset=True).cast(torch.float64)

    def call(h, w, b, o):
        return token_rewards(h, w, b, index=head.index, offset=o, kind=kind, temperature=0.6, clip=2.5)

    assert gradcheck(call, head.leaves)


@not_a_kernel
@pytest.mark.parametrize("vocabulary", [None, 5])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_loss(loss, vocabulary):
    head = make_head(rows=17, width=4, vocabulary=vocabulary, bias=vocabulary or 1, offset=True).cast(torch.float64)

    def call(h, w, b, o):
        return loss_of(replace(head, hidden=h, weight=w, bias=b, offset=o), loss, label_smoothing=0.2)[0]

    assert gradcheck(call, head.leaves)


@devices
def test_backward_twice_gives_the_same_gradients(device):
    head = make_head(device=device, offset=True)
    value, _ = loss_of(head)
    scaled = value * 0.3
    first = [g.clone() for g in grad(scaled, head.leaves, retain_graph=True)]
    for a, b in zip(first, grad(scaled, head.leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@devices
def test_only_what_is_asked_for(device):
    """A frozen backbone or a frozen head costs no gradient of its own, and no_grad none at all."""
    head = make_head(device=device)
    full = grad(loss_of(head)[0], head.leaves)
    frozen_backbone = replace(head, hidden=head.hidden.detach())
    frozen_head = replace(head, weight=head.weight.detach(), bias=head.bias.detach())
    assert all(
        torch.equal(a, b) for a, b in zip(grad(loss_of(frozen_backbone)[0], head.leaves[1:]), full[1:], strict=True)
    )
    assert torch.equal(grad(loss_of(frozen_head)[0], head.hidden)[0], full[0])
    with torch.no_grad():
        value, _ = loss_of(head)
        assert not value.requires_grad
        assert torch.equal(value, loss_of(head)[0])
        assert not token_rewards(*head.args).requires_grad


@devices
@pytest.mark.parametrize("vocabulary", [None, 5])
def test_gradients_are_bit_equal_from_run_to_run(vocabulary, device):
    head = make_head(rows=80 if INTERPRETED else 300, vocabulary=vocabulary, device=device)
    runs = [grad(loss_of(head)[0], head.leaves) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_the_graph_is_freed():
    """The forward pass's gradients live on the node; no cycle may keep them after the loss is gone."""
    head = make_head()
    gc.collect()
    gc.disable()
    try:
        value, _ = loss_of(head)
        node = value.grad_fn
        kept = weakref.ref(node.gradients[0])
        del value, node
        assert kept() is None
    finally:
        gc.enable()


# ---- torch.library and torch.compile ---------------------------------------------------------------------------


@not_a_kernel
@devices
def test_opcheck(device):
    head = make_head(rows=24, width=8, vocabulary=4, bias=4, offset=True, device=device)
    slopes = torch.randn(24, device=device)
    calls = {
        "token_rewards": (*head.args, head.index, head.offset, "gail", 0.5, 1.0),
        "token_rewards_backward": (slopes, *(t.detach() for t in head.args), head.index, None, "logd", 0.5, None, True,
                                   True),
        "head_gradients": (slopes, *(t.detach() for t in head.args), head.index, True, True),
        "scale_gradients_": ([torch.randn(3, device=device)], torch.tensor(2.0, device=device)),
        "discriminator_loss": (*head.args, head.targets, head.weights, head.index, head.offset, head.cu_seqlens,
                               head.pairs, "pairwise", 0.1, 1.0, True, True),
    }  # fmt: skip
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.airl_kernels, name).default, arguments)


@not_a_kernel
@devices
def test_compile_whole(device):
    head = make_head(device=device, offset=True)

    def run(hidden, weight, bias, offset):
        version = replace(head, hidden=hidden, weight=weight, bias=bias, offset=offset)
        rewards = token_rewards(*version.args, **version.extra, kind="gail", clip=2.0)
        return loss_of(version, "bce", label_smoothing=0.1)[0] * 0.5 + loss_of(version, "pairwise")[0] + rewards.mean()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    eager_value, value = run(*head.leaves), compiled(*head.leaves)
    assert torch.allclose(eager_value, value)
    for a, b in zip(grad(eager_value, head.leaves), grad(value, head.leaves), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-8)

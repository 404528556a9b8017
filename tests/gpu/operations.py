"""Every op in every way it is used: the table that the tests run through."""

from collections.abc import Callable

import torch
from airl_kernels import discounted_returns, discriminator_loss, gae, group_advantages, token_rewards
from airl_kernels.testing import (
    TokenHead,
    coin,
    expected_advantages,
    expected_gae,
    expected_loss,
    expected_returns,
    expected_rewards,
    make_token_head,
    normal,
    offsets,
    token_logits,
)
from torch import Tensor

from tests.gpu.device import DEVICE, ON_GPU, pick
from tests.gpu.operation import Operation, Tensors
from tests.gpu.policy_operations import logprob_operations, policy_operations

# ---- the discriminator's head ----------------------------------------------------------------------------------


def _head_of(tensors: Tensors) -> TokenHead:
    names = ("hidden", "weight", "bias", "index", "offset", "targets", "weights", "cu_seqlens", "pairs")
    head = TokenHead(*(tensors.get(name) for name in names))
    wide = torch.promote_types(head.hidden.dtype, torch.float32)
    return TokenHead(*head.args, head.index, head.offset, head.targets.to(wide), head.weights.to(wide),
                     head.cu_seqlens, head.pairs)  # fmt: skip


def _head_operations() -> list[Operation]:
    shapes = {
        "linear": {"rows": pick(5003, 70), "width": pick(896, 40)},
        "linear, wide, no bias": {"rows": pick(1001, 9), "width": pick(4096, 600), "bias": None, "offset": True},
        "linear, wider than registers": {"rows": pick(300, 3), "width": 8200},
        "action": {"rows": pick(3001, 90), "width": pick(896, 40), "vocabulary": 300, "bias": 300, "offset": True},
        "action, odd width": {"rows": pick(777, 40), "width": pick(1537, 33), "vocabulary": 7},
    }
    operations = []
    for name, shape in shapes.items():

        def make(dtype: torch.dtype, seed: int, shape=shape) -> Tensors:
            head = make_token_head(**shape, dtype=dtype, device=DEVICE, seed=seed)
            tensors = {k: getattr(head, k) for k in head.__dataclass_fields__ if getattr(head, k) is not None}
            tensors["hidden"] = tensors["hidden"].detach() / shape["width"] ** 0.5  # logits of ordinary size
            return {**tensors, "upstream": normal(shape["rows"], seed + 1, DEVICE)}

        leaves = ("hidden", "weight", *(("bias",) if shape.get("bias", 1) else ()),
                  *(("offset",) if shape.get("offset") else ()))  # fmt: skip
        for kind, clip in (("logit", None), ("gail", 3.0), ("logd", None))[: 1 if "wide" in name else 3]:
            operations.append(
                Operation(
                    name=f"token_rewards {kind} {name}",
                    make=make,
                    leaves=leaves,
                    terms=30.0,
                    ours=lambda t, k=kind, c=clip: (_rewards(t, k, c),),
                    plain=lambda t, k=kind, c=clip: (expected_rewards(_head_of(t), k, 0.7, c),),
                )
            )
        for loss in ("bce", "wgan", "pairwise")[: 1 if "wide" in name else 3]:
            operations += [
                Operation(
                    name=f"discriminator_loss {loss} {name}",
                    make=_scalar(make),
                    leaves=leaves,
                    ours=lambda t, k=loss: _loss(t, k),
                    plain=lambda t, k=loss: _plain_loss(t, k),
                )
            ]
    return operations


def _scalar(make: Callable[[torch.dtype, int], Tensors]) -> Callable[[torch.dtype, int], Tensors]:
    return lambda dtype, seed: {**make(dtype, seed), "upstream": torch.full((1,), 0.3, device=DEVICE)}


def _rewards(t: Tensors, kind: str, clip: float | None) -> Tensor:
    head = _head_of(t)
    return token_rewards(*head.args, **head.extra, kind=kind, temperature=0.7, clip=clip)


def _loss(t: Tensors, loss: str) -> tuple[Tensor, Tensor]:
    head = _head_of(t)
    value, logits = discriminator_loss(
        *head.args, head.targets, head.weights, **head.extra, loss=loss, label_smoothing=0.1, margin=0.5,
        cu_seqlens=head.cu_seqlens, pairs=head.pairs,
    )  # fmt: skip
    return value, logits


def _plain_loss(t: Tensors, loss: str) -> tuple[Tensor, Tensor]:
    head = _head_of(t)
    return expected_loss(head, loss, 0.1, 0.5), torch.where(head.weights != 0, token_logits(head), 0.0)


# ---- returns ---------------------------------------------------------------------------------------------------


def _returns_operations() -> list[Operation]:
    short = [5, 0, 1, pick(300, 60), 255, 256, 257, 1, 0, pick(2049, 30)]
    long = [3, pick(100_000, 2500), 0, 700]
    group = [0, 0, 1, 0, 1, 1, 0, 2, 2, 1]
    operations = []
    for name, lengths, masked in (("", short, False), (" masked", short, True), (" long", long, False),
                                  (" long masked", long, True)):  # fmt: skip
        total = sum(lengths)

        def make(dtype: torch.dtype, seed: int, total=total, masked=masked) -> Tensors:
            tensors = {"rewards": normal(total, seed, DEVICE), "upstream": normal(total, seed + 2, DEVICE)}
            return tensors | ({"mask": coin(total, seed + 3, DEVICE)} if masked else {})

        cu_seqlens = offsets(lengths, DEVICE) if _exists() else None
        operations.append(
            Operation(
                name=f"discounted_returns{name}",
                make=make,
                float32_only=True,
                leaves=("rewards",),
                slack=8.0,
                ours=lambda t, c=cu_seqlens: (discounted_returns(t["rewards"], 0.9, c, mask=t.get("mask")),),
                plain=lambda t, n=lengths: (_Packed.apply(t["rewards"], t.get("mask"), n, 0.9),),
            )
        )
        if name.startswith(" long"):
            continue
        operations.append(
            Operation(
                name=f"gae{name}",
                float32_only=True,
                slack=8.0,
                make=lambda d, s, m=make, n=total: {**m(d, s), "values": normal(n, s + 1, DEVICE)},
                ours=lambda t, c=cu_seqlens: gae(t["rewards"], t["values"], 0.95, 0.8, c, mask=t.get("mask")),
                plain=lambda t, n=lengths: tuple(
                    x.to(t["rewards"]) for x in expected_gae(t["rewards"], t["values"], n, 0.95, 0.8, t.get("mask"))
                ),
            )
        )
    cu_seqlens, labels = (offsets(short, DEVICE), torch.tensor(group, device=DEVICE)) if _exists() else (None, None)
    for baseline in ("last_token", "all_tokens", "leave_one_out"):
        operations += [
            Operation(
                name=f"group_advantages {baseline}",
                float32_only=True,
                slack=8.0,
                make=lambda d, s: {"rewards": normal(sum(short), s, DEVICE)},
                ours=lambda t, b=baseline: (group_advantages(t["rewards"], cu_seqlens, labels, 0.9, baseline=b),),
                plain=lambda t, b=baseline: (
                    torch.tensor(
                        expected_advantages(t["rewards"].detach(), short, group, 0.9, b, 1e-6, 0.0),
                        dtype=t["rewards"].dtype,
                        device=DEVICE,
                    ),
                ),
            )
        ]
    return operations


def _exists() -> bool:
    return not ON_GPU or torch.cuda.is_available()


class _Packed(torch.autograd.Function):
    """Discounted returns by loops; the gradient is the same loop over every sequence backwards in time."""

    @staticmethod
    def forward(ctx, rewards: Tensor, mask: Tensor | None, lengths: list[int], gamma: float) -> Tensor:
        ctx.mask, ctx.lengths, ctx.gamma = mask, lengths, gamma
        return expected_returns(rewards, lengths, gamma, mask).to(rewards)

    @staticmethod
    def backward(ctx, gradient: Tensor):
        flipped = gradient.flip(0)
        mask = None if ctx.mask is None else ctx.mask.flip(0)
        returns = expected_returns(flipped, ctx.lengths[::-1], ctx.gamma, mask).to(gradient)
        return returns.flip(0), None, None, None


OPERATIONS = {
    operation.name: operation
    for operation in (*_head_operations(), *_returns_operations(), *logprob_operations(), *policy_operations())
}

"""Launches of the scans of `_scan_triton.py`: block sizes, and whether sequences or blocks run in parallel."""

import torch
import triton
from torch import Tensor

from ._common import num_multiprocessors
from ._scan_triton import (
    DISCOUNT,
    HOLD,
    STANDARDISE,
    TD_ERROR,
    _carry_kernel,
    _finish_kernel,
    _moments_kernel,
    _scan_kernel,
    _summary_kernel,
    _value_gradient_kernel,
)

_MEAN_OF = {"last_token": 0, "all_tokens": 1, "leave_one_out": 2}

# ---- launchers -------------------------------------------------------------------------------------------------

_LONG_BLOCK = 2048  # tokens of a block where blocks run in parallel


def scan_block(num_tokens: int, num_sequences: int) -> int:
    """About the average sequence, between 256 and 2048 tokens; eight a lane, two 16-byte loads."""
    average = -(-num_tokens // max(num_sequences, 1))
    return max(256, min(2048, triton.next_power_of_2(average)))


def blocks_in_parallel(num_tokens: int, num_sequences: int, device: torch.device) -> bool:
    """Whether sequences are too few and too long for one program each."""
    return num_sequences < num_multiprocessors(device) and num_tokens > 8192 * num_sequences


def _starts(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """uint8 [N+1]: 1 where a sequence starts, and at N."""
    flags = torch.zeros(num_tokens + 1, dtype=torch.uint8, device=cu_seqlens.device)
    return flags.index_fill_(0, cu_seqlens.long(), 1)


def _scan(
    x: Tensor, cu_seqlens: Tensor, mask: Tensor | None, gamma: float, kind: int, reverse: bool,
    values: Tensor | None = None, following: Tensor | None = None, lam: float = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(y, y + values for TD_ERROR) of the recurrence, by whichever way fills the device."""
    num_tokens, num_sequences = x.numel(), cu_seqlens.numel() - 1
    out = torch.empty_like(x)
    out_returns = torch.empty_like(x) if kind == TD_ERROR else None
    if not num_tokens:
        return out, out_returns
    if not blocks_in_parallel(num_tokens, num_sequences, x.device):
        block = scan_block(num_tokens, num_sequences)
        _scan_kernel[(num_sequences,)](
            x, values, following, mask, None, cu_seqlens, None, out, out_returns, num_sequences, gamma, lam, 0.0, 0.0,
            KIND=kind, REVERSE=reverse, MEAN_OF=0, BLOCK=block, BLOCK_S=1, num_warps=block // 256,
        )  # fmt: skip
        return out, out_returns
    blocks = triton.cdiv(num_tokens, _LONG_BLOCK)
    starts = _starts(cu_seqlens, num_tokens)
    products, sums, carries = torch.empty((3, blocks), dtype=torch.float32, device=x.device).unbind(0)
    _summary_kernel[(blocks,)](
        x, values, following, mask, starts, products, sums, num_tokens, gamma, lam,
        KIND=kind, REVERSE=reverse, BLOCK=_LONG_BLOCK, num_warps=8,
    )  # fmt: skip
    _carry_kernel[(1,)](products, sums, carries, blocks, REVERSE=reverse, BLOCK=1024, num_warps=4)
    _finish_kernel[(blocks,)](
        x, values, following, mask, starts, carries, out, out_returns, num_tokens, blocks, gamma, lam,
        KIND=kind, REVERSE=reverse, BLOCK=_LONG_BLOCK, num_warps=8,
    )  # fmt: skip
    return out, out_returns


def discounted_returns(rewards: Tensor, cu_seqlens: Tensor, mask: Tensor | None, gamma: float, adjoint: bool) -> Tensor:
    return _scan(rewards.contiguous(), cu_seqlens, _bytes(mask), gamma, DISCOUNT, not adjoint)[0]


def group_advantages(
    rewards: Tensor, cu_seqlens: Tensor, group: Tensor, gamma: float, baseline: str, eps: float, min_std: float
) -> Tensor:
    rewards = rewards.contiguous()
    out = torch.empty_like(rewards)
    num_tokens, num_sequences = rewards.numel(), group.numel()
    if not num_tokens:
        return out
    moments = None
    if baseline == "all_tokens":
        moments = torch.empty((4, num_sequences), dtype=torch.float32, device=rewards.device)
        _moments_kernel[(num_sequences,)](rewards, cu_seqlens, moments, num_sequences, BLOCK=1024, num_warps=4)
    block = scan_block(num_tokens, num_sequences)
    _scan_kernel[(num_sequences,)](
        rewards, None, None, None, moments, cu_seqlens, group.contiguous(), out, None, num_sequences,
        gamma, 1.0, eps, min_std, KIND=STANDARDISE, REVERSE=True, MEAN_OF=_MEAN_OF[baseline], BLOCK=block,
        BLOCK_S=min(1024, triton.next_power_of_2(num_sequences)), num_warps=block // 256,
    )  # fmt: skip
    return out


def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor, mask: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    rewards, values, mask = rewards.contiguous(), values.contiguous(), _bytes(mask)
    # With a mask, the value after a token is that of the next valid one, which takes a scan of its own to find.
    following = values if mask is None else _scan(values, cu_seqlens, mask, 0.0, HOLD, True)[0]
    return _scan(rewards, cu_seqlens, mask, gamma, TD_ERROR, True, values, following, lam)


def gae_backward(
    d_advantages: Tensor, d_returns: Tensor, cu_seqlens: Tensor, mask: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    mask, d_returns = _bytes(mask), d_returns.contiguous()
    total = (d_advantages + d_returns).contiguous()
    d_errors, _ = _scan(total, cu_seqlens, mask, gamma * lam, DISCOUNT, False)
    held = d_errors if mask is None else _scan(d_errors, cu_seqlens, mask, 0.0, HOLD, False)[0]
    d_values = torch.empty_like(d_errors)
    num_tokens = d_errors.numel()
    if num_tokens:
        _value_gradient_kernel[(triton.cdiv(num_tokens, 1024),)](
            d_errors, held, d_returns, mask, _starts(cu_seqlens, num_tokens), d_values, num_tokens, gamma,
            BLOCK=1024, num_warps=4,
        )  # fmt: skip
    return d_errors, d_values


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def shipped_launches() -> dict:
    """The launches that are compiled for every chip by `cross_compile`: the shapes of the benchmark.

    Every kind of scan at the short shape; at the others, which differ in the size of a block alone or scan blocks in
    parallel, those of the benchmark.
    """
    launches = {}
    for sequences, length in ((272, 300), (1024, 8192), (1, 1 << 20)):
        x = torch.empty(sequences * length, device="meta")
        mask = torch.empty(sequences * length, dtype=torch.bool, device="meta")
        cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
        group = torch.empty(sequences, dtype=torch.int64, device="meta")
        shape = f"{sequences}x{length}"
        for name, chosen in (("", None), (" masked", mask)) if length != 8192 else (("", None),):
            args = (cu_seqlens, chosen, 0.9)
            launches[f"discounted_returns{name} {shape}"] = lambda x=x, a=args: discounted_returns(x, *a, False)
            launches[f"gae{name} {shape}"] = lambda x=x, a=args: gae(x, x, *a, 0.95)
            if length == 300:
                launches[f"gae backward{name} {shape}"] = lambda x=x, a=args: gae_backward(x, x, *a, 0.95)
        for baseline in {300: tuple(_MEAN_OF), 8192: ("last_token",)}.get(length, ()):
            launches[f"group_advantages {baseline} {shape}"] = lambda x=x, c=cu_seqlens, g=group, b=baseline: (
                group_advantages(x, c, g, 0.9, b, 1e-6, 0.0)
            )
    launches["discounted_returns backward 1x1048576"] = lambda: discounted_returns(x, cu_seqlens, None, 0.9, True)
    return launches

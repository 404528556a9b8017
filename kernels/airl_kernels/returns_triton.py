"""Launches of the scans of `_scan_triton.py`: tile sizes, and whether sequences or tiles run in parallel."""

import torch
import triton
from torch import Tensor

from ._common import num_multiprocessors
from ._scan_triton import (
    DISCOUNT,
    GAE,
    GAE_BACKWARD,
    STANDARDISE,
    _carry_kernel,
    _finish_kernel,
    _moments_kernel,
    _scan_kernel,
    _summary_kernel,
)

_MEAN_OF = {"last_token": 0, "all_tokens": 1, "leave_one_out": 2}

# ---- launchers -------------------------------------------------------------------------------------------------

_LONG_TILE = 1024  # tokens of a tile where tiles run in parallel
# Tiles of a sequence in shared memory, one of them at work: of one input and its mask, of two and theirs. With eight
# programs on a multiprocessor that keeps more than 40 KB on their way.
_STAGES = {False: 5, True: 4}


def scan_tile(num_tokens: int, num_sequences: int) -> int:
    """Tokens of a tile, eight a lane: about the average sequence, between 256 and 512.

    Few warps a program, so that a thousand sequences are resident at once, eight programs on a multiprocessor.
    """
    average = -(-num_tokens // max(num_sequences, 1))
    return max(256, min(512, triton.next_power_of_2(average)))


def tiles_in_parallel(num_tokens: int, num_sequences: int, device: torch.device) -> bool:
    """Whether sequences are too few and too long for one program each."""
    return num_sequences < num_multiprocessors(device) and num_tokens > 8192 * num_sequences


def _starts(cu_seqlens: Tensor | None, length: int, x: Tensor) -> Tensor:
    """uint8 [N+1]: 1 where a sequence starts, and at N."""
    flags = torch.zeros(x.numel() + 1, dtype=torch.uint8, device=x.device)
    if cu_seqlens is None:
        flags[::length] = 1
        return flags
    return flags.index_fill_(0, cu_seqlens.long(), 1)


def _scan(
    kind: int, reverse: bool, x: Tensor, second: Tensor | None, cu_seqlens: Tensor | None, mask: Tensor | None,
    gamma: float, lam: float = 1.0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Both outputs of `kind`, by whichever way fills the device. x: [N], or [B, T] without cu_seqlens."""
    x = x.contiguous()
    second, mask = None if second is None else second.contiguous(), _bytes(mask)
    num_tokens = x.numel()
    out = torch.empty_like(x)
    second_out = None if second is None else torch.empty_like(x)
    if not num_tokens:
        return out, second_out
    num_sequences, length = x.shape if cu_seqlens is None else (cu_seqlens.numel() - 1, 0)
    if not tiles_in_parallel(num_tokens, num_sequences, x.device):
        tile = scan_tile(num_tokens, num_sequences)
        _scan_kernel[(num_sequences,)](
            x, second, mask, None, cu_seqlens, None, out, second_out, num_tokens, num_sequences, length,
            gamma, lam, 0.0, 0.0,
            KIND=kind, REVERSE=reverse, MEAN_OF=0, FORGETS=gamma * lam == 0.0,
            G=tile // 8, BLOCK_S=1, STAGES=_STAGES[second is not None], num_warps=tile // 256,
        )  # fmt: skip
        return out, second_out
    tiles = triton.cdiv(num_tokens, _LONG_TILE)
    starts = _starts(cu_seqlens, length, x)
    products, sums, carries = torch.empty((3, tiles), dtype=torch.float32, device=x.device).unbind(0)
    form = {"KIND": kind, "REVERSE": reverse, "G": _LONG_TILE // 8, "num_warps": _LONG_TILE // 256}
    _summary_kernel[(tiles,)](x, second, mask, starts, products, sums, num_tokens, gamma, lam, **form)
    _carry_kernel[(1,)](products, sums, carries, tiles, BLOCK=1024, num_warps=8)
    _finish_kernel[(tiles,)](x, second, mask, starts, carries, out, second_out, num_tokens, gamma, lam, **form)
    return out, second_out


def discounted_returns(
    rewards: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, gamma: float, adjoint: bool
) -> Tensor:
    return _scan(DISCOUNT, not adjoint, rewards, None, cu_seqlens, mask, gamma)[0]


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
    tile = scan_tile(num_tokens, num_sequences)
    _scan_kernel[(num_sequences,)](
        rewards, None, None, moments, cu_seqlens, group.contiguous(), out, None, num_tokens, num_sequences, 0,
        gamma, 1.0, eps, min_std, KIND=STANDARDISE, REVERSE=True, MEAN_OF=_MEAN_OF[baseline], FORGETS=gamma == 0.0,
        G=tile // 8, BLOCK_S=min(512, triton.next_power_of_2(num_sequences)), STAGES=_STAGES[False],
        num_warps=tile // 256,
    )  # fmt: skip
    return out


def gae(
    rewards: Tensor, values: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    return _scan(GAE, True, rewards, values, cu_seqlens, mask, gamma, lam)


def gae_backward(
    d_advantages: Tensor, d_returns: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    return _scan(GAE_BACKWARD, False, d_advantages, d_returns, cu_seqlens, mask, gamma, lam)


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def shipped_launches() -> dict:
    """The launches that are compiled for every chip by `cross_compile`: the shapes of the benchmark.

    Every kind of scan at the short shape and the masked ones as the benchmark pads them; of the others, which differ
    in the size of a tile alone or scan tiles in parallel, those of the benchmark.
    """
    launches = {}
    for sequences, length in ((272, 300), (1024, 8192), (1, 1 << 20)):
        x = torch.empty(sequences * length, device="meta")
        mask = torch.empty(sequences * length, dtype=torch.bool, device="meta")
        cu_seqlens = torch.empty(sequences + 1, dtype=torch.int32, device="meta")
        group = torch.empty(sequences, dtype=torch.int64, device="meta")
        shape = f"{sequences}x{length}"
        forms = {"": (x, cu_seqlens, None), " masked": (x, cu_seqlens, mask)}
        if sequences > 1:
            forms[" padded"] = (x.view(sequences, length), None, mask.view(sequences, length))
        if length == 8192:
            del forms[" masked"]
        for name, (r, c, m) in forms.items():
            launches[f"discounted_returns{name} {shape}"] = lambda r=r, c=c, m=m: discounted_returns(
                r, c, m, 0.9, False
            )
            launches[f"gae{name} {shape}"] = lambda r=r, c=c, m=m: gae(r, r, c, m, 0.9, 0.95)
            if length == 300:
                launches[f"gae backward{name} {shape}"] = lambda r=r, c=c, m=m: gae_backward(r, r, c, m, 0.9, 0.95)
        for baseline in {300: tuple(_MEAN_OF), 8192: ("last_token",)}.get(length, ()):
            launches[f"group_advantages {baseline} {shape}"] = lambda x=x, c=cu_seqlens, g=group, b=baseline: (
                group_advantages(x, c, g, 0.9, b, 1e-6, 0.0)
            )
    launches["discounted_returns backward 1x1048576"] = lambda: discounted_returns(x, cu_seqlens, None, 0.9, True)
    return launches

"""Flash attention over variable-length segments, one interface for every library that has such a kernel.

A kernel works on one `Cut`: segment i's queries attend to segment i's keys, causally or to all. Tensors are
q, out [Nq, Hq, D], k, v [Nk, Hkv, D] and lse f32 [Nq, Hq], the log-sum-exp of each query's scaled scores.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from airl_fast.errors import UserError
from airl_fast.types import Segments


class Cut:
    """queries, keys: the segments' lengths; a causal cut has equal ones. Device tensors are made on first use."""

    def __init__(self, queries: tuple[int, ...], keys: tuple[int, ...], causal: bool, device: torch.device) -> None:
        self.queries, self.keys, self.causal, self.device = queries, keys, causal, device

    @cached_property
    def cu_queries(self) -> torch.Tensor:
        return self._cumulative(self.queries)

    @cached_property
    def cu_keys(self) -> torch.Tensor:
        return self.cu_queries if self.keys == self.queries else self._cumulative(self.keys)

    @property
    def longest_queries(self) -> int:
        """For flash kernels, which read a longest of 1 as one query in every segment, where there may be none."""
        return max(2, *self.queries)

    @cached_property
    def buckets(self) -> "Buckets":
        return Buckets(self.queries, self.device)

    def _cumulative(self, lengths: tuple[int, ...]) -> torch.Tensor:
        host = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0).to(torch.int32)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pieces:
    """The two attention calls of one packed batch. own: every prompt and completion causally onto itself.
    shared: the completions of each prompt onto that prompt; None without completions. longest: of prompt and
    completion together."""

    own: Cut
    shared: Cut | None
    prompt_rows: int
    longest: int
    kernel: "Kernel"


def pieces(segments: Segments, device: torch.device, kernel: "Kernel") -> Pieces:
    owned = segments.prompts + segments.completions
    queries, begin, longest = [], 0, 0
    for prompt, count in zip(segments.prompts, segments.counts, strict=True):
        own = segments.completions[begin : begin + count]
        queries.append(sum(own))
        longest = max(longest, prompt + max(own, default=0))
        begin += count
    return Pieces(
        own=Cut(owned, owned, True, device),
        shared=Cut(tuple(queries), segments.prompts, False, device) if segments.completions else None,
        prompt_rows=segments.prompt_rows,
        longest=longest,
        kernel=kernel,
    )


class Kernel(Protocol):
    name: str

    def forward(self, q, k, v, cut: Cut, scale: float) -> tuple[torch.Tensor, torch.Tensor]: ...

    def backward(self, grad, q, k, v, out, lse, cut: Cut, scale: float) -> tuple[torch.Tensor, ...]: ...


def choose_kernel(name: str, device: torch.device, dtype: torch.dtype) -> Kernel:
    """name: auto, flash_attn, torch_flash or sdpa, as model.attention says. UserError where it cannot run."""
    half = dtype in (torch.bfloat16, torch.float16)
    if name == "auto":
        best = "flash_attn" if _has_flash_attn() else "torch_flash"
        name = best if device.type == "cuda" and half else "sdpa"
    if name == "sdpa":
        return CpuFlash() if device.type == "cpu" else Segmentwise()
    if device.type != "cuda" or not half:
        raise UserError(
            f"model.attention={name} needs a CUDA GPU and model.dtype=bfloat16, and this is {device.type} with "
            f"{str(dtype).removeprefix('torch.')}; use model.attention=auto."
        )
    if name == "torch_flash":
        return TorchFlash()
    if not _has_flash_attn():
        raise UserError("model.attention=flash_attn: the package flash-attn is not installed; use auto.")
    return FlashAttn()


def _has_flash_attn() -> bool:
    from importlib.util import find_spec

    return find_spec("flash_attn") is not None


class TorchFlash:
    """The flash kernel that torch ships for CUDA, over variable-length segments. Its lse is [Hq, Nq]."""

    name = "torch flash, variable length"

    def forward(self, q, k, v, cut, scale):
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, cut.cu_queries, cut.cu_keys, cut.longest_queries, max(cut.keys)),
            *(0.0, cut.causal, False),
            scale=scale,
        )
        return out, lse.t().contiguous()

    def backward(self, grad, q, k, v, out, lse, cut, scale):
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is not there
        return torch.ops.aten._flash_attention_backward(
            *(grad, q, k, v, out, lse.t().contiguous()),
            *(cut.cu_queries, cut.cu_keys, cut.longest_queries, max(cut.keys)),
            *(0.0, cut.causal, state, torch.empty(0, device=q.device)),
            scale=scale,
        )


class FlashAttn:
    """The package flash-attn 2 (Dao 2023), 2.7 or later: the operators beneath its `flash_attn_varlen_func`."""

    name = "flash_attn, variable length"

    def __init__(self) -> None:
        from flash_attn import flash_attn_interface

        self._forward = flash_attn_interface._wrapped_flash_attn_varlen_forward
        self._backward = flash_attn_interface._wrapped_flash_attn_varlen_backward

    def forward(self, q, k, v, cut, scale):
        out, lse, *_ = self._forward(
            *(q, k, v, cut.cu_queries, cut.cu_keys, cut.longest_queries, max(cut.keys)),
            *(0.0, scale),
            causal=cut.causal,
        )
        return out, lse.t().contiguous()

    def backward(self, grad, q, k, v, out, lse, cut, scale):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        self._backward(
            *(grad, q, k, v, out, lse.t().contiguous(), dq, dk, dv),
            *(cut.cu_queries, cut.cu_keys, cut.longest_queries, max(cut.keys)),
            *(0.0, scale, cut.causal, -1, -1, 0.0, None, False),
        )
        return dq, dk, dv


class Segmentwise:
    """Plain products, a segment at a time, on any device and in any type: what runs in float32 on CUDA, where no
    flash kernel does."""

    name = "torch products, a segment at a time"

    def forward(self, q, k, v, cut, scale):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=_wide(q))
        for (a, b), (c, d) in _pairs(cut):
            scores = self._scores(q[a:b], k[c:d], cut.causal, scale)
            lse[a:b] = scores.logsumexp(-1).t()
            values = v[c:d].repeat_interleave(q.shape[1] // v.shape[1], 1)
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values.to(scores.dtype)).to(q.dtype)
        return out, lse

    def backward(self, grad, q, k, v, out, lse, cut, scale):
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        repeats = q.shape[1] // k.shape[1]
        for (a, b), (c, d) in _pairs(cut):
            p = (self._scores(q[a:b], k[c:d], cut.causal, scale) - lse[a:b].t()[..., None]).exp()
            g, o = grad[a:b].to(p.dtype), out[a:b].to(p.dtype)
            values = v[c:d].repeat_interleave(repeats, 1).to(p.dtype)
            ds = p * (torch.einsum("qhd,khd->hqk", g, values) - (g * o).sum(-1).t()[..., None]) * scale
            dq[a:b] = torch.einsum("hqk,khd->qhd", ds, k[c:d].repeat_interleave(repeats, 1).to(p.dtype)).to(q.dtype)
            wide = (-1, k.shape[1], repeats, k.shape[2])
            dk[c:d] = torch.einsum("hqk,qhd->khd", ds, q[a:b].to(p.dtype)).view(wide).sum(2).to(k.dtype)
            dv[c:d] = torch.einsum("hqk,qhd->khd", p, g).view(wide).sum(2).to(v.dtype)
        return dq, dk, dv

    @staticmethod
    def _scores(q, k, causal, scale):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", q.to(_wide(q)), keys.to(_wide(q))) * scale
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), float("-inf"))
        return scores


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pairs(cut: Cut):
    q, k = 0, 0
    for queries, keys in zip(cut.queries, cut.keys, strict=True):
        yield (q, q + queries), (k, k + keys)
        q, k = q + queries, k + keys


class Buckets:
    """Segments of like length as rectangles, for a kernel that takes only those: its padding lives inside the
    attention call and reaches no layer of the model.

    rows: per rectangle int64 [S_b * L_b], the row each place reads; past a segment's end its last row again, so that
    every value is finite. shapes: (S_b, L_b). place: int64 [N], where each row's result is among all places.
    inside: per rectangle bool [S_b, L_b].
    """

    WASTE = 1.2  # a rectangle may be this many times its segments' rows

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        sizes = np.asarray(lengths, dtype=np.int64)
        starts = np.cumsum(sizes) - sizes
        order = np.argsort(-sizes, kind="stable")
        self.rows, self.inside, self.shapes = [], [], []
        place, begin, offset = np.empty(int(sizes.sum()), dtype=np.int64), 0, 0
        while begin < len(order):
            width = int(sizes[order[begin]])
            filled = np.cumsum(sizes[order[begin:]])
            wasteful = np.flatnonzero(width * np.arange(1, len(filled) + 1) > self.WASTE * filled)
            members = order[begin : begin + (int(wasteful[0]) if len(wasteful) else len(filled))]
            columns = np.arange(width)[None]
            inside = columns < sizes[members, None]
            rows = starts[members, None] + np.minimum(columns, sizes[members, None] - 1)
            place[rows[inside]] = offset + np.flatnonzero(inside.ravel())
            self.rows.append(torch.from_numpy(rows.ravel()).to(device))
            self.inside.append(torch.from_numpy(inside).to(device))
            self.shapes.append(rows.shape)
            begin, offset = begin + len(members), offset + rows.size
        self.place = torch.from_numpy(place).to(device)

    def cut(self, x: torch.Tensor, b: int) -> torch.Tensor:
        """[N, H, ...] -> [S_b, H, L_b, ...] of rectangle b."""
        size, width = self.shapes[b]
        return x.index_select(0, self.rows[b]).unflatten(0, (size, width)).transpose(1, 2)

    def join(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """The rectangles [S_b, H, L_b, ...] -> [N, H, ...]."""
        return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts]).index_select(0, self.place)


class CpuFlash:
    """torch's flash kernel for the CPU, which takes rectangles: buckets of like length for the causal cut; for the
    other, all of a prompt's queries at once, the query heads of one key head laid end to end."""

    name = "torch SDPA flash for the CPU"

    def forward(self, q, k, v, cut, scale):
        if cut.causal:
            found = [self._run(*self._rectangle(q, k, v, cut, b), True, scale) for b in range(len(cut.buckets.shapes))]
            return cut.buckets.join([out for out, _ in found]), cut.buckets.join([lse for _, lse in found])
        outs, lses = [], []
        for (a, b), (c, d) in _pairs(cut):
            out, lse = self._run(self._stack(q[a:b], k.shape[1]), _heads(k[c:d]), _heads(v[c:d]), False, scale)
            outs.append(self._unstack(out, b - a, q.shape[1]))
            lses.append(self._unstack(lse, b - a, q.shape[1]))
        return torch.cat(outs), torch.cat(lses)

    def backward(self, grad, q, k, v, out, lse, cut, scale):
        if cut.causal:
            return self._causal_backward(grad, q, k, v, out, lse, cut, scale)
        heads, kv_heads = q.shape[1], k.shape[1]
        found = []
        for (a, b), (c, d) in _pairs(cut):
            queries = [self._stack(x[a:b], kv_heads) for x in (grad, q, out, lse)]
            dq, dk, dv = self._run_backward(*queries[:2], _heads(k[c:d]), _heads(v[c:d]), *queries[2:], False, scale)
            found.append((self._unstack(dq, b - a, heads), dk[0].transpose(0, 1), dv[0].transpose(0, 1)))
        return tuple(torch.cat(parts) for parts in zip(*found, strict=True))

    def _causal_backward(self, grad, q, k, v, out, lse, cut, scale):
        buckets, repeats, found = cut.buckets, q.shape[1] // k.shape[1], []
        for b in range(len(buckets.shapes)):
            g = buckets.cut(grad, b) * buckets.inside[b][:, None, :, None]  # a repeated row counts once
            queries, keys, values = self._rectangle(q, k, v, cut, b)
            dq, dk, dv = self._run_backward(
                g, queries, keys, values, buckets.cut(out, b), buckets.cut(lse, b), True, scale
            )
            if repeats > 1:
                dk, dv = (x.unflatten(1, (-1, repeats)).sum(2) for x in (dk, dv))
            found.append((dq, dk, dv))
        return tuple(buckets.join(list(parts)) for parts in zip(*found, strict=True))

    @staticmethod
    def _rectangle(q, k, v, cut, b):
        keys, values = cut.buckets.cut(k, b), cut.buckets.cut(v, b)
        repeats = q.shape[1] // k.shape[1]
        if repeats > 1:
            keys, values = keys.repeat_interleave(repeats, 1), values.repeat_interleave(repeats, 1)
        return cut.buckets.cut(q, b), keys, values

    @staticmethod
    def _stack(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """[Q, Hq, ...] -> [1, Hkv, (Hq / Hkv) · Q, ...]."""
        return x.unflatten(1, (kv_heads, -1)).movedim(0, 2).flatten(1, 2)[None]

    @staticmethod
    def _unstack(x: torch.Tensor, count: int, heads: int) -> torch.Tensor:
        return x[0].unflatten(1, (-1, count)).flatten(0, 1).transpose(0, 1)

    @staticmethod
    def _run(q, k, v, causal, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)

    @staticmethod
    def _run_backward(grad, q, k, v, out, lse, causal, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )


def _heads(x: torch.Tensor) -> torch.Tensor:
    """[K, H, D] -> [1, H, K, D]."""
    return x.transpose(0, 1)[None]

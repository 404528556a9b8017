"""Attention over packed rows in which completions share their prompt: `Segments` says who sees whom.

A completion's row attends to two sets of keys: its own completion up to itself, and the whole of its prompt. Each is
an ordinary call of a flash kernel over variable-length segments, and the two results merge by their log-sum-exp

    lse = log(e^lse₁ + e^lse₂),    out = e^(lse₁ - lse) out₁ + e^(lse₂ - lse) out₂.

So no key is copied for the completions that share it. Backward, a flash kernel rebuilds its probabilities as
exp(score - lse) and subtracts rowsum(dout ∘ out): given the *merged* lse and out, each call returns exactly its own
keys' part of the gradients, and the two queries' gradients add up.

The first idea is that of shared-prefix decoding (Juravsky et al., Hydragen, arXiv 2402.05099); here it is trained
through. `attend_dense` is the specification. The kernels are in flash.py.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from airl_fast.models.flash import Kernel, Pieces
from airl_fast.types import Segments, TraceBatch

# Names of attention implementations in transformers: the prefix, then a kernel's name as in model.attention.
PREFIX = "airl_"
KERNELS = ("auto", "flash_attn", "torch_flash", "sdpa")


def attend_dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """The specification. q: [N, Hq, D]. k, v: [N, Hkv, D], query head h reads key head h // (Hq / Hkv).
    mask: bool [N, N]. Returns [N, Hq, D]."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), v)


def dense_mask(segments: Segments, device: torch.device) -> torch.Tensor:
    """bool [N, N]: row q may attend to row k."""

    def owners(lengths: tuple[int, ...], first: int = 0) -> torch.Tensor:
        return torch.repeat_interleave(torch.arange(len(lengths)) + first, torch.tensor(lengths, dtype=torch.int64))

    prompts = len(segments.prompts)
    segment = torch.cat([owners(segments.prompts), owners(segments.completions, prompts)]).to(device)
    reads = torch.repeat_interleave(torch.arange(prompts), torch.tensor(segments.counts, dtype=torch.int64))
    prompt_of_segment = torch.cat([torch.arange(prompts), reads]).to(device)
    row = torch.arange(len(segment), device=device)
    own = (segment[:, None] == segment) & (row[:, None] >= row)
    shared = (prompt_of_segment[segment][:, None] == segment) & (segment >= prompts)[:, None]
    return own | shared


def dense_masks(batch: TraceBatch, config) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask of every row, bool [1, 1, N, N], for a model that keeps its own attention; one per kind of layer where
    the model has several. ValueError for layers that take no mask (recurrent or chunked ones)."""
    mask = dense_mask(batch.segments, batch.tokens.device)[None, None]
    window = sliding_window(config)
    distance = batch.positions[:, None] - batch.positions
    near = mask if window is None else mask & (distance < window)
    kinds = set(getattr(config, "layer_types", None) or ())
    others = kinds - {"full_attention", "sliding_attention"}
    if others:
        raise ValueError(f"layers of {', '.join(sorted(others))} take no mask")
    return {"full_attention": mask, "sliding_attention": near} if len(kinds) > 1 else near


def sliding_window(config) -> int | None:
    """How far back a row of the model's windowed layers sees, None without such layers."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


class SharedPrefixAttention(torch.autograd.Function):
    """q: [N, Hq, D]. k, v: [N, Hkv, D]. Returns [N, Hq, D] in their dtype."""

    @staticmethod
    def forward(ctx, q, k, v, scale: float, pieces: Pieces, kernel: Kernel):
        out, lse = kernel.forward(q, k, v, pieces.own, scale)
        if pieces.shared is not None:
            rows = pieces.prompt_rows
            out_2, lse_2 = kernel.forward(q[rows:], k[:rows], v[:rows], pieces.shared, scale)
            out[rows:], lse[rows:] = _merge(out[rows:], lse[rows:], out_2, lse_2)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.pieces, ctx.kernel = scale, pieces, kernel
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        pieces, kernel = ctx.pieces, ctx.kernel
        grad = grad.contiguous()
        dq, dk, dv = kernel.backward(grad, q, k, v, out, lse, pieces.own, ctx.scale)
        if pieces.shared is not None:
            rows = pieces.prompt_rows
            dq_2, dk_2, dv_2 = kernel.backward(
                grad[rows:], q[rows:], k[:rows], v[:rows], out[rows:], lse[rows:], pieces.shared, ctx.scale
            )
            dq[rows:] += dq_2
            dk[:rows] += dk_2
            dv[:rows] += dv_2
        return dq, dk, dv, None, None, None


def attend_one_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """q: [R, Hq, 1, D]. k, v: [R, Hkv, T, D]. mask: [R, 1, 1, T], 0 or minus infinity. Returns [R, Hq, 1, D].

    The query heads of one key head are laid out as that head's queries, so no key or value is repeated for them.
    """
    grouped = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    out = torch.nn.functional.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.reshape(q.shape)


def _merge(out_1, lse_1, out_2, lse_2):
    """out: [R, H, D], lse: f32 [R, H]. In fp32: in bf16 the weights would lose what flash kernels keep."""
    lse = torch.logaddexp(lse_1, lse_2)
    first, second = (lse_1 - lse).exp()[..., None], (lse_2 - lse).exp()[..., None]
    return (out_1 * first + out_2 * second).to(out_1.dtype), lse


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packing: Pieces | None = None,
    one_token: bool = False,
    **kwargs,
):
    """What transformers' layers call. query: [1, Hq, N, D]; key, value: [1, Hkv, N, D]. Returns ([1, N, Hq, D], None).

    Without `packing` (sampling with a cache) it is torch's SDPA with the mask given, or `attend_one_token`.
    """
    if one_token:
        return attend_one_token(query, key, value, attention_mask, scaling).transpose(1, 2), None
    if packing is None:
        if attention_mask is not None and attention_mask.shape[-2:] == (1, 1) and query.shape[-2] > 1:
            raise RuntimeError(f"{type(module).__name__} does not hand its keyword arguments to its attention.")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise RuntimeError(f"packed attention has no {name}, which {type(module).__name__} asks for.")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = SharedPrefixAttention.apply(q, k, v, scale, packing, packing.kernel)
    return out[None], None


for _kernel in KERNELS:
    AttentionInterface.register(PREFIX + _kernel, packed_attention_forward)
    AttentionMaskInterface.register(PREFIX + _kernel, sdpa_mask)


def set_packed(model: PreTrainedModel, kernel: str = "auto") -> None:
    """Make the model attend over packed rows, where it can.

    A model that cannot keeps its own attention; `hidden_states` then hands it the mask of every row.
    """
    if why_not_shared(model) is None:
        model.set_attn_implementation(PREFIX + kernel)


def keep_own_attention(model: PreTrainedModel, reason: str) -> None:
    """For a model that was seen to compute something else over packed rows."""
    model.set_attn_implementation("sdpa")
    for module in (model, model.base_model):
        module.keeps_own_attention = reason


def shares_prompts(module: torch.nn.Module) -> bool:
    return packed_kernel(module) is not None


def packed_kernel(module: torch.nn.Module) -> str | None:
    """The kernel's name that `set_packed` chose, None for a model with its own attention."""
    name = module.config._attn_implementation or ""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None


def why_not_shared(model: PreTrainedModel) -> str | None:
    """Why this model's attention cannot be replaced by the packed one, None when it can."""
    if getattr(model, "keeps_own_attention", None):
        return model.keeps_own_attention
    config, name = model.config.get_text_config(), type(model).__name__
    if not model._can_set_attn_implementation():
        return f"{name} does not take its attention from transformers' attention interface"
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"{name} has layers of {', '.join(sorted(others))}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{name} caps its attention scores"
    return None

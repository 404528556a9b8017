"""A float64 reference of every policy-loss variant, written token by token and sequence by sequence."""

import itertools
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

VARIANTS = ("ppo", "grpo", "dapo", "dr_grpo", "bnpo", "cispo", "gspo")


@dataclass(frozen=True)
class Tokens:
    """Per-token inputs [M] on the CPU in float64, and the options of the loss."""

    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor | None
    ref_logprobs: Tensor | None
    is_ratio: Tensor | None
    lengths: tuple[int, ...]
    options: dict[str, float | None] = field(default_factory=dict)

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def arguments(self, dtype: torch.dtype, device: str) -> dict[str, object]:
        """As keyword arguments of the losses."""

        def place(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, dtype if t.is_floating_point() else t.dtype)

        return {
            "old_logprobs": place(self.old_logprobs),
            "advantages": place(self.advantages),
            "loss_mask": place(self.mask),
            "cu_seqlens": place(self.cu_seqlens),
            "ref_logprobs": place(self.ref_logprobs),
            "is_ratio": place(self.is_ratio),
            **self.options,
        }


def tokens(logprobs: Tensor, lengths: tuple[int, ...], *, seed: int = 0, masked: bool = True, extras: bool = True,
           **options: float | None) -> Tokens:  # fmt: skip
    """Inputs around `logprobs`, ratios within about e^±0.6; numbers exactly representable in float32."""
    make = torch.Generator().manual_seed(seed)
    count = logprobs.numel()
    assert sum(lengths) == count

    def noise(scale: float) -> Tensor:
        return (torch.randn(count, generator=make) * scale).double()

    base = logprobs.detach().cpu().float().double()
    old, ref, is_ratio = base + noise(0.3), base + noise(0.5), noise(0.3).exp().clamp(max=2.0).float().double()
    advantages = noise(1.0)
    advantages[::5] = 0.0
    mask = (torch.rand(count, generator=make) > 0.25) if masked else None
    if not extras:
        return Tokens(old.float().double(), advantages, mask, None, None, lengths, options)
    return Tokens(old.float().double(), advantages, mask, ref.float().double(), is_ratio, lengths,
                  {"beta": 0.05, **options})  # fmt: skip


def with_garbage(case: Tokens) -> Tokens:
    """The same loss, with NaN and infinity where the mask is false."""
    bad = torch.where(torch.arange(case.mask.numel()) % 2 == 0, torch.nan, torch.inf).double()

    def spoil(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.where(case.mask, t, bad)

    return replace(
        case, old_logprobs=spoil(case.old_logprobs), advantages=spoil(case.advantages),
        ref_logprobs=spoil(case.ref_logprobs), is_ratio=spoil(case.is_ratio),
    )  # fmt: skip


def plain_loss(logprobs: Tensor, case: Tokens, variant: str, denominator: float | None = None) -> Tensor:
    """The loss by the papers' formulas, one token at a time, with autograd."""
    low, high = 1 - case.options.get("clip_low", 0.2), 1 + case.options.get("clip_high", 0.2)
    dual, beta = case.options.get("dual_clip"), case.options.get("beta", 0.0)
    bounds = case.cu_seqlens.tolist()
    sums, counts = [], []
    for first, last in itertools.pairwise(bounds):
        live = [t for t in range(first, last) if case.mask is None or case.mask[t]]
        sequence_ratio = None
        if variant == "gspo" and live:
            sequence_ratio = torch.stack([logprobs[t] - case.old_logprobs[t] for t in live]).mean().detach()
        losses = []
        for t in live:
            a = case.advantages[t]
            ratio = torch.exp(logprobs[t] - case.old_logprobs[t])
            if variant == "gspo":  # s_i(θ) as value, the token's own gradient (GSPO-token)
                ratio = torch.exp(sequence_ratio + logprobs[t] - logprobs[t].detach())
            if variant == "cispo":
                loss = -ratio.detach().clamp(low, high) * a * logprobs[t]
            else:
                gain = torch.minimum(ratio * a, ratio.clamp(low, high) * a)
                if dual is not None and a < 0:
                    gain = torch.maximum(gain, dual * a)
                loss = -gain
            if case.is_ratio is not None:
                loss = loss * case.is_ratio[t]
            if case.ref_logprobs is not None:
                d = case.ref_logprobs[t] - logprobs[t]
                loss = loss + beta * (torch.exp(d) - d - 1)
            losses.append(loss)
        total = torch.stack(losses).sum() if losses else logprobs.sum() * 0
        if variant in ("grpo", "gspo"):
            total = total / max(len(live), 1)
        sums.append(total)
        counts.append(len(live))
    if denominator is None:
        denominator = len(sums) if variant in ("grpo", "gspo") else max(sum(counts), 1)
    return torch.stack(sums).sum() / denominator

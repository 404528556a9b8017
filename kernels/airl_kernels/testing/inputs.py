"""Random inputs of the ops, from a seed. The same numbers on every device."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


def normal(count: int, seed: int, device: str = "cpu") -> Tensor:
    """f32 [count]."""
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(device)


def coin(count: int, seed: int, device: str = "cpu") -> Tensor:
    """bool [count], true for about 60%."""
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) > 0.4).to(device)


def offsets(lengths: Sequence[int], device: str = "cpu") -> Tensor:
    """cu_seqlens int32 [S+1] of sequences of these lengths."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


# ---- the discriminator's head ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenHead:
    """What the token-head ops take, with the leaves that receive gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    index: Tensor | None
    offset: Tensor | None
    targets: Tensor
    weights: Tensor
    cu_seqlens: Tensor
    pairs: Tensor

    @property
    def args(self) -> tuple:
        return self.hidden, self.weight, self.bias

    @property
    def extra(self) -> dict:
        return {"index": self.index, "offset": self.offset}

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias, self.offset) if t is not None]

    def cast(self, dtype: torch.dtype) -> "TokenHead":
        """The same numbers in another type, as fresh leaves."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_()

        return replace(
            self, hidden=leaf(self.hidden), weight=leaf(self.weight), bias=leaf(self.bias), offset=leaf(self.offset),
            targets=self.targets.to(dtype), weights=self.weights.to(dtype),
        )  # fmt: skip


def make_token_head(
    rows: int, width: int, *, vocabulary: int | None = None, bias: int | None = 1, offset: bool = False,
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> TokenHead:  # fmt: skip
    """Seven sequences, one of them empty; a fifth of the rows has weight 0; one row of the weight is frequent.

    vocabulary: rows of the action head's weight; None for the linear head. bias: how many entries; None for none.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cuts = torch.rand(5, generator=generator).mul(rows).long().sort().values
    cu_seqlens = torch.cat((torch.tensor([0]), cuts, cuts[-1:], torch.tensor([rows]))).int()
    index = None
    if vocabulary is not None:
        index = torch.randint(0, vocabulary, (rows,), generator=generator)
        index[rows // 4 : rows // 2 + 1] = vocabulary - 1  # longer than a chunk of the scatter kernel
    weights = torch.rand(rows, generator=generator) * (torch.rand(rows, generator=generator) > 0.2) / max(rows, 1)

    def leaf(t: Tensor) -> Tensor:
        return t.to(device, dtype).requires_grad_()

    return TokenHead(
        hidden=leaf(random(rows, width)),
        weight=leaf(random(width) if vocabulary is None else random(vocabulary, width)),
        bias=None if bias is None else leaf(random(bias)),
        index=None if index is None else index.to(device),
        offset=leaf(random(rows)) if offset else None,
        targets=(torch.rand(rows, generator=generator) > 0.5).float().to(device),
        weights=weights.to(device),
        cu_seqlens=cu_seqlens.to(device),
        pairs=torch.tensor([-1, 0, 0, -1, 3, 5, 3], device=device),  # 5 is empty: that pair does not count
    )


# ---- the policy's head -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VocabularyHead:
    """hidden [N, H], weight [V, H], bias [V] or None, targets [N]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.hidden, self.weight, self.bias) if t is not None and t.requires_grad]


def make_vocabulary_head(
    rows: int, width: int, vocab: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", bias: bool = False,
    frozen: bool = False, seed: int = 0, spread: float = 2.0,
) -> VocabularyHead:  # fmt: skip
    """Random inputs whose logits have a standard deviation of about `spread`."""
    make = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=make) * spread
    weight = torch.randn(vocab, width, generator=make) / width**0.5
    shift = torch.randn(vocab, generator=make) if bias else None
    targets = torch.randint(vocab, (rows,), generator=make)
    if rows > 1:
        targets[:2] = torch.tensor([0, vocab - 1])
    place = {"dtype": dtype, "device": device}
    return VocabularyHead(
        hidden.to(**place).requires_grad_(),
        weight.to(**place).requires_grad_(not frozen),
        None if shift is None else shift.to(**place).requires_grad_(not frozen),
        targets.to(device),
    )


def wide(inputs: VocabularyHead, device: str = "cpu") -> VocabularyHead:
    """The same numbers in float64, with leaves of their own."""

    def copy(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(device).double().requires_grad_(tensor.requires_grad)

    return VocabularyHead(copy(inputs.hidden), copy(inputs.weight), copy(inputs.bias), inputs.targets.to(device))


# ---- the policy's loss -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyTokens:
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
        return offsets(self.lengths)

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


def make_policy_tokens(
    logprobs: Tensor, lengths: tuple[int, ...], *, seed: int = 0, masked: bool = True, extras: bool = True,
    **options: float | None,
) -> PolicyTokens:  # fmt: skip
    """Inputs around `logprobs`, ratios within about e^±0.6; numbers exactly representable in float32.

    A fifth of the advantages is 0. extras: a reference policy with beta 0.05, and importance weights.
    """
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
        return PolicyTokens(old.float().double(), advantages, mask, None, None, lengths, options)
    return PolicyTokens(
        old.float().double(), advantages, mask, ref.float().double(), is_ratio, lengths, {"beta": 0.05, **options}
    )


def with_garbage(case: PolicyTokens) -> PolicyTokens:
    """The same loss, with NaN and infinity where the mask is false."""
    bad = torch.where(torch.arange(case.mask.numel()) % 2 == 0, torch.nan, torch.inf).double()

    def spoil(t: Tensor | None) -> Tensor | None:
        return None if t is None else torch.where(case.mask, t, bad)

    return replace(
        case, old_logprobs=spoil(case.old_logprobs), advantages=spoil(case.advantages),
        ref_logprobs=spoil(case.ref_logprobs), is_ratio=spoil(case.is_ratio),
    )  # fmt: skip

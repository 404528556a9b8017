"""Random inputs of the ops, made on the device. All come from a seed and a shape."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from bench.shapes import Shape

if TYPE_CHECKING:
    from bench.cases import Case

GAMMA, LAMBDA, GROUP_SIZE, LABEL_SMOOTHING, CLIP = 0.9, 0.95, 16, 0.1, 0.2
# log π - log π_old takes these values: some tokens are clipped, none is so near a bound (log 1.2, log 0.8) that the
# rounding of its log-probability decides.
LOG_RATIOS = (0.0, 0.05, -0.05, 0.4, -0.4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Common to all. leaves: what receives gradients. upstream: f32 [N], the gradient that arrives at [N] outputs."""

    PER_TOKEN: ClassVar[tuple[str, ...]] = ()
    LEAVES: ClassVar[tuple[str, ...]] = ()
    upstream: Tensor | None = None

    @property
    def leaves(self) -> list[Tensor]:
        tensors = (getattr(self, name) for name in self.LEAVES)
        return [tensor for tensor in tensors if tensor is not None and tensor.requires_grad]

    def mapped(self, change: Callable[[Tensor], Tensor], names: tuple[str, ...] | None = None) -> Self:
        """With fresh leaves, each tensor (or those of `names`) changed."""
        changed = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and (names is None or field.name in names):
                changed[field.name] = change(value.detach()).requires_grad_(value.requires_grad)
        return replace(self, **changed)

    def double(self) -> Self:
        return self.mapped(lambda t: t.double() if t.is_floating_point() else t)

    def clone(self) -> Self:
        return self.mapped(torch.clone)

    def take(self, rows: Tensor) -> Self:
        """The problem of these tokens alone."""
        return self.mapped(lambda t: t.index_select(0, rows), self.PER_TOKEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadInputs(Inputs):
    """hidden [N, H], weight [H] or [V, H] with index [N], bias [1], targets and weights f32 [N]."""

    PER_TOKEN: ClassVar = ("hidden", "index", "targets", "weights")
    LEAVES: ClassVar = ("hidden", "weight", "bias")
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    index: Tensor | None
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceInputs(Inputs):
    """B sequences of T tokens: rewards, values, logprobs, old_logprobs, advantages f32 [B, T]; group int64 [B].

    mask: bool [B, T], the last sixteenth of every sequence is padding; None for a single sequence, which travels
    packed. cu_seqlens: int32 [B+1].
    """

    PER_TOKEN: ClassVar = ()
    LEAVES: ClassVar = ("logprobs",)
    rewards: Tensor
    values: Tensor
    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor | None
    cu_seqlens: Tensor
    group: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs(Inputs):
    """What a policy loss takes per token [N], in sequences of equal length; advantages equal over a sequence.

    Equal because some peers take one advantage per sequence. denominator: loss tokens of the whole problem.
    """

    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    sequences: int
    denominator: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearInputs(PolicyInputs):
    """hidden [N, H], weight [V, H] or, with more rows than the vocabulary, [P, H]: `head` is what a loss takes."""

    PER_TOKEN: ClassVar = ("hidden", "targets", "old_logprobs", "advantages", "mask", "upstream")
    LEAVES: ClassVar = ("hidden", "weight")
    hidden: Tensor
    weight: Tensor
    vocabulary: int

    @property
    def head(self) -> Tensor:
        """[V, H]: the first rows of the weight, a view; its gradient is one of the whole weight."""
        return self.weight if self.weight.shape[0] == self.vocabulary else self.weight[: self.vocabulary]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitInputs(PolicyInputs):
    """logits [N, V] in a buffer of one row more, which Liger-Kernel's loss wants to see."""

    PER_TOKEN: ClassVar = ("logits", "targets", "old_logprobs", "advantages", "mask", "upstream")
    LEAVES: ClassVar = ("logits",)
    logits: Tensor


def make_inputs(case: "Case", shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Inputs:
    draw = _Draw(device, seed)
    if shape.family == "head":
        return _head(case, shape, dtype, draw)
    if shape.family == "sequences":
        return _sequences(case, shape, draw)
    if shape.family == "linear":
        width, vocabulary = shape.size("hidden"), shape.size("vocabulary")
        hidden = draw.normal(shape.tokens, width, dtype=dtype).mul_(2.0)
        weight = draw.normal(shape.padded or vocabulary, width, dtype=dtype).mul_(width**-0.5)
        targets = draw.integers(vocabulary, shape.tokens)
        logprobs = _logprobs(lambda rows: hidden[rows] @ weight[:vocabulary].T, targets, vocabulary)
        common = _policy(shape, targets, logprobs, draw)
        hidden.requires_grad_(case.backward)
        weight.requires_grad_(case.train_weight)
        return LinearInputs(hidden=hidden, weight=weight, vocabulary=vocabulary, **common)
    vocabulary = shape.size("vocabulary")
    logits = draw.normal(shape.tokens + 1, vocabulary, dtype=dtype).mul_(2.0)[: shape.tokens]
    targets = draw.integers(vocabulary, shape.tokens)
    common = _policy(shape, targets, _logprobs(logits.__getitem__, targets, vocabulary), draw)
    return LogitInputs(logits=logits.requires_grad_(case.backward), **common)


class _Draw:
    def __init__(self, device: torch.device, seed: int) -> None:
        self.device, self.generator = device, torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=dtype, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def _head(case: "Case", shape: Shape, dtype: torch.dtype, draw: _Draw) -> HeadInputs:
    tokens, width, vocabulary = shape.sizes
    weights = draw.integers(5, tokens).add(1).float() / tokens  # none is 0: our kernels would not read its row
    rows = (vocabulary, width) if case.index else (width,)
    return HeadInputs(
        hidden=draw.normal(tokens, width, dtype=dtype).requires_grad_(case.backward),
        weight=draw.normal(*rows, dtype=dtype).mul_(width**-0.5).requires_grad_(case.train_weight),
        bias=draw.normal(1, dtype=dtype).requires_grad_(case.train_weight),
        index=draw.integers(vocabulary, tokens) if case.index else None,
        targets=draw.integers(2, tokens).float(),
        weights=weights,
    )


def _sequences(case: "Case", shape: Shape, draw: _Draw) -> SequenceInputs:
    batch, length = shape.sizes
    padding = torch.arange(length, device=draw.device) < length - length // 16
    old = draw.normal(batch, length) - 8.0
    ratios = torch.tensor(LOG_RATIOS, device=draw.device)[draw.integers(len(LOG_RATIOS), batch, length)]
    return SequenceInputs(
        rewards=draw.normal(batch, length),
        values=draw.normal(batch, length),
        logprobs=(old + ratios).requires_grad_(case.backward),
        old_logprobs=old,
        advantages=draw.normal(batch, length),
        mask=padding.expand(batch, length).contiguous() if batch > 1 else None,
        cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=draw.device) * length,
        group=torch.arange(batch, device=draw.device) // GROUP_SIZE,
    )


def _slices(tokens: int, vocabulary: int) -> list[slice]:
    """So few tokens at a time that their float32 logits take about 256 MiB."""
    step = max(1, (64 << 20) // vocabulary)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _logprobs(logits_of: Callable[[slice], Tensor], targets: Tensor, vocabulary: int) -> Tensor:
    """Log-probabilities f32 [N] of the targets; logits_of gives some rows of the logits."""
    picked = [
        torch.log_softmax(logits_of(rows).float(), -1).gather(1, targets[rows, None])[:, 0]
        for rows in _slices(targets.numel(), vocabulary)
    ]
    return torch.cat(picked)


def _policy(shape: Shape, targets: Tensor, logprobs: Tensor, draw: _Draw) -> dict[str, object]:
    sequences, tokens = shape.sequences, shape.tokens
    length = tokens // sequences
    ratios = torch.tensor(LOG_RATIOS, device=draw.device)[draw.integers(len(LOG_RATIOS), tokens)]
    mask = torch.arange(length, device=draw.device).lt(length - length // 16).repeat(sequences)
    return {
        "targets": targets,
        "old_logprobs": logprobs - ratios,
        "advantages": draw.normal(sequences).repeat_interleave(length),
        "mask": mask,
        "sequences": sequences,
        "denominator": float(sequences * (length - length // 16)),
        "upstream": draw.normal(tokens),
    }

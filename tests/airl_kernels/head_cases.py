"""Inputs, float64 references and error measures for the tests of the token head and of returns.

The references are written from the formulas in plain Python and torch; they share no code with the library.
With TRITON_INTERPRET=1 the ops on CPU tensors run the Triton kernels through their launchers, so that every test of
these files tests the kernels as well; `test_head_and_returns_interpreted.py` starts such a run.
"""

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# The interpreter computes in numpy, which has no bfloat16; the kernels' bf16 is covered by compilation and on GPUs.
DTYPES = [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16]
EXAMPLES = 4 if INTERPRETED else 60  # of a property test


def use_triton_on_the_cpu() -> None:
    """Put the Triton launchers behind the ops on CPU tensors; float64 keeps the reference, as it does on CUDA."""
    from airl_kernels import returns, returns_triton, token_head, token_head_triton

    for contract, kernels, names in (
        (token_head, token_head_triton, ("token_rewards", "token_rewards_backward", "head_gradients",
                                         "scale_gradients_", "discriminator_loss")),
        (returns, returns_triton, ("discounted_returns", "group_advantages", "gae", "gae_backward")),
    ):  # fmt: skip
        for name in names:
            reference, launcher = getattr(contract, f"{name}_reference"), getattr(kernels, name)

            def kernel(*args, reference=reference, launcher=launcher):
                tensors = [t for arg in args for t in (arg if isinstance(arg, list) else [arg])]
                wide = any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in tensors)
                return reference(*args) if wide else launcher(*args)

            getattr(contract, f"_{name.removesuffix('_')}").register_kernel("cpu")(kernel)


if INTERPRETED:
    use_triton_on_the_cpu()


SEEDS = range(1 if INTERPRETED else 6)
ROWS = 40 if INTERPRETED else 120
# Units of rounding beyond twice the error of careful torch. The interpreter adds in numpy's order, not a GPU's, and
# runs fewer seeds: there the tests are of the kernels' logic.
SLACK = 16 if INTERPRETED else 0.5


def errors(value: Tensor, exact: Tensor, floor: float = 1e-3) -> tuple[float, float]:
    """(root mean square, largest) error as a fraction of the largest exact magnitude, or of `floor` if it vanishes."""
    if not exact.numel():
        return 0.0, 0.0
    scale = float(exact.detach().abs().max().clamp(min=floor))
    difference = (value.detach().double() - exact.detach()) / scale
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def assert_as_careful(ours: Tensor, careful: Tensor, exact: Tensor, floor: float = 1e-3) -> None:
    """Our root mean square error is at most twice that of careful torch in the same precision, or rounding itself.

    The largest error, which a single number decides, may be four times that of careful torch.
    """
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    mine, theirs = errors(ours, exact, floor), errors(careful, exact, floor)
    slack = SLACK * torch.finfo(ours.dtype).eps
    assert mine[0] <= 2 * theirs[0] + slack, (mine, theirs)
    assert mine[1] <= 4 * theirs[1] + slack, (mine, theirs)


def assert_all_as_careful(runs: list[list[tuple[Tensor, ...]]], terms: float = 0.1) -> None:
    """`assert_as_careful` output by output, over several runs together: one number's rounding error is luck.

    runs: for each seed [ours, careful, exact], each a tuple of the same outputs. Single numbers are sums that may
    cancel; terms: what the magnitudes of their terms add up to at least.
    """
    for output in range(len(runs[0][0])):
        floor = terms if runs[0][0][output].numel() == 1 else 1e-3
        assert_as_careful(*(torch.cat([run[who][output].reshape(-1) for run in runs]) for who in range(3)), floor)


@dataclass(frozen=True)
class Head:
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

    def cast(self, dtype: torch.dtype) -> "Head":
        """The same numbers in another type, as fresh leaves."""

        def leaf(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.detach().to(dtype).requires_grad_()

        return replace(
            self, hidden=leaf(self.hidden), weight=leaf(self.weight), bias=leaf(self.bias), offset=leaf(self.offset),
            targets=self.targets.to(dtype), weights=self.weights.to(dtype),
        )  # fmt: skip


def make_head(
    rows: int = ROWS, width: int = 40, *, vocabulary: int | None = None, bias: int | None = 1, offset: bool = False,
    dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
) -> Head:  # fmt: skip
    """Seven sequences, one of them empty; a fifth of the rows has weight 0; one row of the weight is frequent."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
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

    return Head(
        hidden=leaf(normal(rows, width)),
        weight=leaf(normal(width) if vocabulary is None else normal(vocabulary, width)),
        bias=None if bias is None else leaf(normal(bias)),
        index=None if index is None else index.to(device),
        offset=leaf(normal(rows)) if offset else None,
        targets=(torch.rand(rows, generator=generator) > 0.5).float().to(device),
        weights=weights.to(device),
        cu_seqlens=cu_seqlens.to(device),
        pairs=torch.tensor([-1, 0, 0, -1, 3, 5, 3], device=device),  # 5 is empty: that pair does not count
    )


def logits(head: Head) -> Tensor:
    """z from the formula, differentiable, in the type of the head (float32 for bfloat16)."""
    compute = torch.promote_types(head.hidden.dtype, torch.float32)
    weight = head.weight.to(compute)
    hidden = head.hidden.to(compute)
    z = hidden @ weight if head.index is None else (hidden * weight[head.index]).sum(-1)
    if head.bias is not None:
        z = z + (head.bias if head.bias.numel() == 1 else head.bias[head.index]).to(compute)
    return z if head.offset is None else z + head.offset.to(compute)


def expected_rewards(head: Head, kind: str, temperature: float, clip: float | None) -> Tensor:
    x = logits(head) / temperature
    reward = {"logit": x, "gail": -logsigmoid(-x), "logd": logsigmoid(x)}[kind]
    return reward if clip is None else reward.clamp(-clip, clip)


def expected_loss(head: Head, loss: str, smoothing: float, margin: float) -> Tensor:
    """The loss from its definition; sequences and pairs one at a time. Rows of weight 0 are cut out before."""
    live = head.weights != 0
    z, w, y = logits(head)[live], head.weights[live], head.targets[live]
    if loss == "bce":
        return (w * binary_cross_entropy_with_logits(z, y * (1 - smoothing) + smoothing / 2, reduction="none")).sum()
    if loss == "wgan":
        return (w * z)[y == 0].sum() - (w * z)[y == 1].sum()
    spread = torch.zeros_like(head.weights).to(z.dtype).masked_scatter(live, z)
    terms = []
    for perturbed, expert in enumerate(head.pairs.tolist()):
        if expert < 0:
            continue
        scores = []
        for s in (expert, perturbed):
            part = slice(int(head.cu_seqlens[s]), int(head.cu_seqlens[s + 1]))
            total = head.weights[part].sum()
            scores.append((head.weights[part] * spread[part]).sum() / total if total > 0 else None)
        if None not in scores:
            terms.append(-logsigmoid(-(margin - (scores[0] - scores[1]))))
    return torch.stack(terms).mean() if terms else z.sum() * 0

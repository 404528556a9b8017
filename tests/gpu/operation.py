"""One op in one way it is used, beside the same thing in plain torch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # of one call, by name: what a CUDA graph reads from


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """Makes tensors, computes them by the library (`ours`) and by formula (`plain`, differentiable, in whatever type
    the tensors have). Both return the outputs; gradients reach `leaves` from the first.

    make: (type of hidden states and logits, seed) -> tensors. leaves: names that receive gradients.

    float32_only: nothing of it is ever bf16. syncs: the host waits for the device, as documented. terms: what the
    magnitudes that a single-number output sums add up to at least, as sums may cancel. slack: units of rounding beyond
    twice the error of `plain`, for the GPU's own exp and log; more where `plain` computes in double throughout.
    """

    name: str
    make: Callable[[torch.dtype, int], Tensors]
    ours: Callable[[Tensors], tuple[Tensor, ...]]
    plain: Callable[[Tensors], tuple[Tensor, ...]]
    leaves: tuple[str, ...] = ()
    float32_only: bool = False
    syncs: bool = False
    terms: float = 0.1
    slack: float = 2.0

    def run(self, function: Callable[[Tensors], tuple[Tensor, ...]], tensors: Tensors) -> tuple[Tensor, ...]:
        """Outputs, then gradients of Σ upstream · (first output); fresh leaves, so that nothing is shared."""
        inputs = {k: t.detach().requires_grad_(k in self.leaves) for k, t in tensors.items()}
        outputs = function(inputs)
        if not self.leaves:
            return outputs
        upstream = tensors["upstream"].to(outputs[0]).view(outputs[0].shape)
        gradients = torch.autograd.grad(outputs[0], [inputs[k] for k in self.leaves], upstream, allow_unused=True)
        found = tuple(
            torch.zeros_like(inputs[k]) if g is None else g for k, g in zip(self.leaves, gradients, strict=True)
        )
        return (*(o.detach() for o in outputs), *found)

    def exact(self, tensors: Tensors) -> tuple[Tensor, ...]:
        wide = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
        return self.run(self.plain, wide)

"""A model and its fused loss compiled as one graph. Run: python docs/examples/torch_compile.py

The operations are custom ops with shape functions and registered gradients: torch.compile traces through them without
a break (`fullgraph=True` would raise), and Inductor fuses what surrounds them. The check compares compiled and eager.
"""

import torch
from airl_kernels import linear_logprob
from torch import Tensor, nn

TOKENS, WIDTH, VOCAB = 48, 32, 100


class Model(nn.Module):
    """A block, a projection, and an objective of log-probabilities and entropies."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        hidden = x + self.block(x)
        logprobs, entropy = linear_logprob(hidden, self.head.weight, targets, entropy=True)
        return -logprobs.mean() - 0.01 * entropy.mean()


def gradients(function: nn.Module, model: Model, x: Tensor, targets: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = function(x, targets)
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def main(backend: str = "inductor") -> float:
    """The largest difference of a gradient, compiled and eager, relative to its largest entry."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, targets = torch.randn(TOKENS, WIDTH, device=device), torch.randint(0, VOCAB, (TOKENS,), device=device)
    (loss, eager), (same, traced) = gradients(model, model, x, targets), gradients(compiled, model, x, targets)
    worst = max(((a - b).abs().max() / a.abs().max()).item() for a, b in zip(eager, traced, strict=True))
    assert torch.allclose(loss, same, rtol=1e-5) and worst < 1e-4
    print(f"loss {loss.item():.6f}, compiled {same.item():.6f}, gradients differ by {worst:.1e} at most")
    return worst


if __name__ == "__main__":
    main()

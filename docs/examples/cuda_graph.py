"""A loss and its gradients captured in a CUDA graph and replayed on new data. Run: python docs/examples/cuda_graph.py

Capture needs fixed shapes and operations that never wait for the device: a mask instead of `rows` picked by a count,
and `compact=False`, the default. New data is copied into the tensors that were captured.
Without a GPU it says so and checks the same step without the graph.
"""

from collections.abc import Callable

import torch
from airl_kernels import linear_ppo_loss
from torch import Tensor

TOKENS, WIDTH, VOCAB = 64, 32, 128


def batch(device: str, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "hidden": torch.randn(TOKENS, WIDTH, generator=generator),
        "targets": torch.randint(0, VOCAB, (TOKENS,), generator=generator),
        "old_logprobs": -4.0 - torch.rand(TOKENS, generator=generator),
        "advantages": torch.randn(TOKENS, generator=generator),
        "loss_mask": torch.rand(TOKENS, generator=generator) > 0.2,
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def step(data: dict[str, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """(loss [], its gradient in weight [V, H])."""
    loss, _ = linear_ppo_loss(weight=weight, **data)
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


def captured(data: dict[str, Tensor], weight: Tensor) -> Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """`step` as a CUDA graph over copies of `data`."""
    static = {name: tensor.clone() for name, tensor in data.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and chooses kernels, which cannot happen during capture
        for _ in range(3):
            step(static, weight)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step(static, weight)

    def replay(fresh: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        for name, tensor in fresh.items():
            static[name].copy_(tensor)
        graph.replay()
        return result

    return replay


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    if device == "cuda":
        run = captured(batch(device, seed=1), weight)
    else:
        print("no GPU: the step runs without a graph")

        def run(data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return step(data, weight)

    for seed in (2, 3):
        loss, gradient = run(batch(device, seed))
        expected_loss, expected = step({k: v.double() if v.is_floating_point() else v
                                        for k, v in batch(device, seed).items()},
                                       weight.detach().double().requires_grad_())  # fmt: skip
        error = (gradient - expected).abs().max().item() / expected.abs().max().item()
        assert abs(loss.item() - expected_loss.item()) < 1e-4 and error < 1e-3
        print(f"batch {seed}: loss {loss.item():.6f}, gradient's largest relative error against float64 {error:.1e}")


if __name__ == "__main__":
    main()

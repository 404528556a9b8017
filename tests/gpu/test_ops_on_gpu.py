"""Every op of the table in `operations.py`, forward and backward: right, repeatable, without waiting, in a graph."""

import pytest
import torch
from airl_kernels.testing import INTERPRETED, assert_as_careful, in_the_worst_order, peak_bytes, product_count

from tests.gpu.device import DEVICE, DTYPES, ON_GPU, dtypes, gpu_only, needs_device, pick
from tests.gpu.operation import Operation, Tensors
from tests.gpu.operations import OPERATIONS

pytestmark = needs_device
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def equal(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@dtypes
@every_operation
def test_error_is_within_twice_that_of_careful_torch(name, dtype):
    operation = OPERATIONS[name]
    if operation.float32_only and dtype != torch.float32:
        pytest.skip("takes float32 numbers only")
    tensors = operation.make(dtype, 0)
    ours, exact = operation.run(operation.ours, tensors), operation.exact(tensors)
    careful = in_the_worst_order(lambda: operation.run(operation.plain, tensors))
    assert len(ours) == len(exact) > 0
    assert all(x.isfinite().all() for x in exact)
    slack = 16.0 if INTERPRETED else operation.slack
    for a, b, c in zip(ours, careful, exact, strict=True):
        floor, units = 1e-3, slack
        if a.numel() == 1:  # its error is luck, that of careful torch as well: some roundings of what it sums
            floor = operation.terms
            units = max(4 * slack, 0.5 * torch.finfo(dtype).eps / torch.finfo(a.dtype).eps)
        assert_as_careful(a, b, c, floor, units)
    if operation.leaves:
        assert any(gradient.any() for gradient in ours[-len(operation.leaves) :])


@every_operation
def test_bit_equal_from_run_to_run(name):
    operation = OPERATIONS[name]
    tensors = operation.make(DTYPES[-1], 0)
    assert equal(operation.run(operation.ours, tensors), operation.run(operation.ours, tensors))


@gpu_only
@every_operation
def test_the_host_never_waits(name):
    operation = OPERATIONS[name]
    tensors = operation.make(torch.bfloat16, 0)
    operation.run(operation.ours, tensors)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        if operation.syncs:
            with pytest.raises(RuntimeError, match="synchronizing"):
                operation.run(operation.ours, tensors)
        else:
            operation.run(operation.ours, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replay(operation: Operation, dtype: torch.dtype) -> tuple[Tensors, tuple[torch.Tensor, ...], torch.cuda.CUDAGraph]:
    """Forward and backward recorded on the tensors of seed 0."""
    static = operation.make(dtype, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            operation.run(operation.ours, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = operation.run(operation.ours, static)
    return static, outputs, graph


@gpu_only
@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if not operation.syncs])
def test_a_cuda_graph_replays_on_other_numbers(name):
    operation = OPERATIONS[name]
    static, outputs, graph = replay(operation, torch.bfloat16)
    for seed in (1, 0):
        other = operation.make(torch.bfloat16, seed)
        for key, tensor in other.items():
            static[key].detach().copy_(tensor.detach())
        graph.replay()
        torch.cuda.synchronize()
        for found, expected in zip(outputs, operation.run(operation.ours, other), strict=True):
            # Inside a graph cuBLAS may choose another algorithm.
            difference = (found.float() - expected.float()).abs().max()
            assert difference <= 4 * torch.finfo(torch.bfloat16).eps * expected.float().abs().max(), f"seed {seed}"


COMPILED = (
    "token_rewards gail linear", "discriminator_loss bce linear", "discriminator_loss pairwise action",
    "discounted_returns masked", "gae", "group_advantages last_token", "linear_logprob V=17 frozen",
    "linear_logprob V=17 trainable", "selective_log_softmax V=17 in place", "ppo_loss grpo",
    "linear_ppo_loss gspo trainable", "linear_ppo_loss ppo frozen",
)  # fmt: skip


@pytest.mark.skipif(INTERPRETED, reason="the graph is the same")
@pytest.mark.parametrize("name", COMPILED)
def test_compiles_whole(name):
    operation = OPERATIONS[name]
    tensors = operation.make(torch.float32, 0)
    # Building machine code takes a compiler and minutes on the CPU; the graph is what is tried there.
    compiled = torch.compile(operation.ours, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for a, b in zip(operation.run(compiled, tensors), operation.run(operation.ours, tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@dtypes
@pytest.mark.parametrize("variant", ["ppo", "gspo"])
@pytest.mark.parametrize("mode", ["trainable", "frozen"])
def test_compact_changes_nothing_but_rounding(mode, variant, dtype):
    whole, compact = (OPERATIONS[f"linear_ppo_loss {variant} {mode}{how}"] for how in ("", " compact"))
    tensors = whole.make(dtype, 0)
    results = [operation.run(operation.ours, tensors) for operation in (whole, compact)]
    # Fewer rows may be multiplied by another kernel of cuBLAS: float32 sums over V = 3001 in another order.
    allowed = (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    for a, b in zip(*results, strict=True):
        scale = a.abs().max()
        assert scale > 0
        assert float((a - b).abs().max() / scale) < allowed


# ---- products and memory ---------------------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED, reason="counts the products of the torch loop, which is the same")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("linear_logprob V=50257 frozen", 2), ("linear_logprob V=50257 trainable", 4),
        ("linear_ppo_loss ppo trainable", 3), ("linear_ppo_loss ppo frozen", 2), ("linear_ppo_loss gspo frozen", 2),
    ],
)  # fmt: skip
def test_number_of_products(name, count):
    operation = OPERATIONS[name]
    tensors = operation.make(DTYPES[-1], 0)
    rows = len(tensors["targets"])
    vocab, width = tensors["weight"].shape
    assert product_count(lambda: operation.run(operation.ours, tensors), rows, width, vocab) == count


@pytest.mark.skipif(INTERPRETED, reason="measures torch's own allocations")
@pytest.mark.parametrize("loss", [False, True], ids=["linear_logprob", "linear_ppo_loss"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_twice_the_rows_take_the_same_temporaries(frozen, loss):
    from airl_kernels import linear_logprob, linear_ppo_loss
    from airl_kernels.testing import make_vocabulary_head

    width, vocab, chunk = pick(64, 8), pick(151936, 4000), pick(256, 16)

    def temporaries(rows: int) -> int:
        head = make_vocabulary_head(rows, width, vocab, dtype=DTYPES[-1], device=DEVICE, frozen=frozen)
        old, advantages = torch.full((rows,), -12.0, device=DEVICE), torch.ones(rows, device=DEVICE)

        def run():
            options = {"chunk_rows": chunk}
            if loss:
                value, _ = linear_ppo_loss(head.hidden, head.weight, head.targets, old, advantages, **options)
            else:
                value = linear_logprob(head.hidden, head.weight, head.targets, **options).sum()
            return torch.autograd.grad(value, head.leaves())

        kept = rows * (2 * width * head.hidden.itemsize + 60)  # J or d hidden twice, and what is stored per row
        return peak_bytes(run, DEVICE) - kept

    small, large = temporaries(4 * chunk), temporaries(8 * chunk)
    assert small > chunk * vocab * torch.finfo(DTYPES[-1]).bits // 8
    assert large <= 1.1 * small

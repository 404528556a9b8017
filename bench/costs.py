"""The least that an op has to do: bytes to move and floating point operations, by case and shape.

N tokens, H hidden size, V vocabulary, e bytes per element (2 for bf16), G = 2·N·H·V the operations of one product
of hidden states and vocabulary. Vectors of one number per token are left out beside matrices.

    token_rewards           e·N·H           hidden is read once
    discriminator_loss      2·e·N·H         one pass: hidden read, its gradient written
      with index            3·e·N·H + e·V·H the rows of the weight are read as well, its dense gradient written
    discounted_returns      9·N             float32 in and out, and the mask; 8·N without mask
    group_advantages        8·N
    gae                     17·N            two in, two out, and the mask; 16·N without
    ppo_loss                17·N            three in, the gradient out, and the mask; 16·N without
    linear_logprob          G without gradients, 2·G frozen, 4·G trainable (logits are made again)
    linear_ppo_loss         2·G frozen, 3·G trainable
    selective_log_softmax   e·N·V forward, 3·e·N·V with backward (also ppo_loss from logits)

Where a product is needed its operations are the floor, otherwise the bytes. What the row kernels between the
products move (`row_bytes`) is not part of the floor: a kernel that fused them into the products would not move it.
"""

from dataclasses import dataclass

from bench.cases import Case
from bench.shapes import Shape

_PRODUCTS = {
    ("linear_logprob", "no_grad"): 1,
    ("linear_logprob", "no_grad, entropy"): 1,
    ("linear_logprob", "frozen f+b"): 2,
    ("linear_logprob", "trainable f+b"): 4,
    ("linear_ppo_loss", "frozen f+b"): 2,
    ("linear_ppo_loss", "trainable f+b"): 3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """bytes: at least moved between memory and chip. flops: 0 where the op is bound by bytes.

    row_bytes: moved besides by our design, between the products of a linear op.
    """

    bytes: int
    flops: int = 0
    row_bytes: int = 0

    @property
    def bound(self) -> str:
        return "gemm" if self.flops else "copy"


def cost_of(case: Case, shape: Shape, itemsize: int) -> Cost:
    """itemsize: bytes per element of hidden states, weights and logits."""
    tokens = shape.tokens
    if shape.family == "sequences":
        mask = int(shape.sequences > 1)
        per_token = {
            "discounted_returns": 8 + mask,
            "group_advantages": 8,
            "gae": 16 + mask,
            "ppo_loss": 16 + mask,
        }
        return Cost(bytes=per_token[case.op] * tokens)
    vocabulary = shape.size("vocabulary")
    if shape.family == "logits":
        return Cost(bytes=(3 if case.backward else 1) * itemsize * tokens * vocabulary)
    matrix, weight = itemsize * tokens * shape.size("hidden"), itemsize * vocabulary * shape.size("hidden")
    if shape.family == "head":
        if case.index:
            return Cost(bytes=3 * matrix + weight)
        return Cost(bytes=(2 if case.backward else 1) * matrix)
    logits = itemsize * tokens * vocabulary
    gradients = (matrix if case.backward else 0) + (weight if case.train_weight else 0)
    # Statistics read the logits; the gradient reads and overwrites them. The float32 gradient of the weight is
    # rounded to its type at the end.
    rows = (3 if case.backward else 1) * logits
    rounding = (4 + itemsize) * vocabulary * shape.size("hidden") if case.train_weight and itemsize < 4 else 0
    return Cost(
        bytes=matrix + weight + gradients,
        flops=_PRODUCTS[case.op, case.mode] * 2 * tokens * shape.size("hidden") * vocabulary,
        row_bytes=rows + rounding,
    )

"""What is measured: ours first, then the peers in the order in which a time budget keeps them."""

from bench.cases import Backend
from bench.peers import airl, airl_torch, cce, compiled, liger, loops, torch_eager, trl

BACKENDS: tuple[Backend, ...] = (airl, torch_eager, airl_torch, trl, liger, cce, loops, compiled)

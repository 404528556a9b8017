"""What is measured: ours first, then the peers in the order in which a time budget keeps them."""

from bench.cases import Backend
from bench.peers import airl, airl_torch, cce, compiled, liger, liger_scaled, loops, torch_eager, trl, verl

BACKENDS: tuple[Backend, ...] = (
    *(airl, torch_eager, liger, liger_scaled, compiled, cce, verl, trl),
    *(airl_torch, loops),
)

"""The Triton launchers behind the ops on CPU tensors, for TRITON_INTERPRET=1."""

from airl_kernels._common import DEFINED


def run_kernels_on_the_cpu() -> None:
    """From now on every op does on CPU tensors what it does on CUDA: Triton launchers, the formula for float64.

    Only of use where Triton interprets, which it decides at its import: in a process of its own.
    """
    for op, on_cuda in DEFINED.values():
        op.register_kernel("cpu")(on_cuda)

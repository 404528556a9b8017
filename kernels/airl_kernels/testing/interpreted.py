"""The Triton launchers behind the ops on CPU tensors, for TRITON_INTERPRET=1."""

from types import SimpleNamespace

from airl_kernels._common import DEFINED


def run_kernels_on_the_cpu() -> None:
    """From now on every op does on CPU tensors what it does on CUDA: Triton launchers, the formula for float64.

    Only of use where Triton interprets, which it decides at its import: in a process of its own.
    """
    for op, on_cuda in DEFINED.values():
        op.register_kernel("cpu")(on_cuda)
    _patch_the_language_once()


def _patch_the_language_once() -> None:
    """Triton's interpreter patches `triton.language` at every call of a function, which takes it a third of its time,
    and takes that back after every launch; a process that does nothing else may leave it patched."""
    from triton.runtime import interpreter

    patch, done = interpreter._patch_lang, set()

    def once(function):
        if function.__module__ not in done:
            done.add(function.__module__)
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once

"""Matrix products that add their terms in the order one names: legal, exact to the last rounding, and hostile.

A processor that nobody here has may run a kernel that adds in another order than ours does. `products_in_order` puts
such kernels behind torch's own on the CPU, for the whole process, so that the library's products, plain torch's and
those inside custom operators all change. As a plugin, for whole test files and the processes that they start:

    AIRL_PRODUCT_ORDER=forwards PYTEST_ADDOPTS='-p tests.product_orders' python -m pytest tests/airl_kernels
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 22  # terms held at once


def _chain(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """left [M, K] @ right [K, N] in float32, k = 0, 1, 2, …; every product and every sum rounded."""
    total = np.zeros(left.shape[0] * right.shape[1], np.float32)
    step = max(1, _BLOCK // max(1, total.size))
    for start in range(0, left.shape[1], step):
        part = slice(start, start + step)
        terms = (left.T[part, :, None] * right[part, None, :]).reshape(-1, total.size)
        total = np.add.accumulate(np.concatenate([total[None], terms]), axis=0)[-1]
    return total.reshape(left.shape[0], right.shape[1])


def _halves(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """As two threads that share the terms."""
    middle = left.shape[1] // 2
    return _chain(left[:, :middle], right[:middle]) + _chain(left[:, middle:], right[middle:])


ORDERS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "forwards": _chain,
    "backwards": lambda left, right: _chain(left[:, ::-1], right[::-1]),
    "halves": _halves,
}


def product(left: Tensor, right: Tensor, order: str) -> Tensor:
    """left [M, K] @ right [K, N]: float64 by numpy, anything else summed in float32 and rounded once."""
    if left.dtype == torch.float64:
        return torch.from_numpy(np.matmul(left.numpy(), right.numpy()))
    return torch.from_numpy(ORDERS[order](left.float().numpy(), right.float().numpy())).to(left.dtype)


def _kernels(order: str) -> dict[str, Callable]:
    def mm(left: Tensor, right: Tensor) -> Tensor:
        return product(left.detach(), right.detach(), order)

    def bmm(left: Tensor, right: Tensor) -> Tensor:
        return torch.stack([mm(a, b) for a, b in zip(left, right, strict=True)]) if len(left) else left @ right

    def mv(left: Tensor, right: Tensor) -> Tensor:
        return mm(left, right[:, None])[:, 0]

    def dot(left: Tensor, right: Tensor) -> Tensor:
        return mm(left[None], right[:, None])[0, 0]

    def added(multiply: Callable) -> Callable:
        def run(bias: Tensor, left: Tensor, right: Tensor, *, beta=1, alpha=1) -> Tensor:
            found = multiply(left.to(bias.dtype), right.to(bias.dtype)) * alpha
            return found if beta == 0 else bias * beta + found  # beta 0: what bias holds does not count

        return run

    kernels = {"mm": mm, "bmm": bmm, "mv": mv, "dot": dot}
    return kernels | {"addmm": added(mm), "baddbmm": added(bmm), "addmv": added(mv)}


def _into(function: Callable) -> Callable:
    def run(*args, out: Tensor, **kwargs) -> Tensor:
        found = function(*args, **kwargs)
        return out.resize_(found.shape).copy_(found)

    return run


def _in_place(function: Callable) -> Callable:
    return lambda target, *args, **kwargs: target.copy_(function(target, *args, **kwargs))


def _install(order: str) -> torch.library.Library:
    """Replace torch's products until the library returned is destroyed."""
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order}.")
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's own kernels are overridden is the purpose
        for name, function in _kernels(order).items():
            library.impl(name, function, "CPU", allow_override=True)
            library.impl(f"{name}.out", _into(function), "CPU", allow_override=True)
            if name in ("addmm", "baddbmm", "addmv"):
                library.impl(f"{name}_", _in_place(function), "CPU", allow_override=True)
    return library


@contextmanager
def products_in_order(order: str) -> Iterator[None]:
    """Within it every matrix product of the CPU adds up in this order, one of ORDERS."""
    library = _install(order)
    try:
        yield
    finally:
        library._destroy()


def pytest_configure(config) -> None:
    """As a plugin: for as long as the process lives."""
    config.product_orders = _install(os.environ["AIRL_PRODUCT_ORDER"])

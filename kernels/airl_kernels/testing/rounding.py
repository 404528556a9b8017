"""Torch whose matrix products err as much as any order of adding their terms may, on every processor alike.

A product's entry is a sum s = Σ t_k of K terms. A library adds them in whatever order its kernel for this shape, this
processor and this number of threads likes; the order is not ours, and a budget must not measure it.

Adding in order k = 1..K, each partial sum S_k is rounded: ŝ - s = Σ δ_k S_k to first order, |δ_k| <= u = eps / 2
(Higham, Accuracy and Stability of Numerical Algorithms, 2002, §4.2). If every δ_k were u this would reach γ_K Σ|t|: for
K = 151,936 terms that cancel, three times what one expects of |s|, and no bound to judge by. Taken as independent with
mean 0, as in Higham and Mary (A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5),
2019), the errors add up to

    E (ŝ - s)² <= u² Σ_k E S_k².

In an order that knows nothing of the terms, k of them drawn without replacement, E S_k² <= (k/K)² s² + ‖t‖² for any
numbers t, with ‖t‖² = Σ t_k²; and however the order is chosen, S_k stays near ‖t‖ where one term outweighs the rest. So

    E (ŝ - s)² <= u² K (s² + ‖t‖²)

(for random data: Higham and Mary, Sharper Probabilistic Backward Error Analysis for Basic Linear Algebra Kernels with
Random Data, SIAM J. Sci. Comput. 42(5), 2020). Blocked, unrolled and split sums have shorter chains and err less.

Independence fails in one way that our sums know: beside a large partial sum S, terms below u|S| are lost, all of them,
and their errors are the terms. Beside the row of the target that is what becomes of p·W for probabilities p below
6e-8: added last to first, 2.3 u √K ‖t‖ was seen for V = 151,936. Hence `_LOST` = 3.

Inside `WorstProducts` each entry of a float32 or narrower product is the exact one plus a normal number of size
3 u √K (s² + ‖t‖²)^½, so that every later step carries errors on as in a real run. A budget of twice the error found so
is six times the bound on the root mean square of independent errors: by Azuma's inequality, with partial sums of that
size and every |δ_k| = u, one number in 3e7 exceeds it (2 exp(-6²/2)), and the root mean square of several less often.
It is 2e-4 of what one expects of a sum of 151,936 terms that cancel, 2e-6 for 16 terms.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
# Products by operator: how many arguments lie before the two factors.
_PRODUCTS = {
    _ATEN.mm.default: 0, _ATEN.bmm.default: 0, _ATEN.mv.default: 0, _ATEN.dot.default: 0,
    _ATEN.addmm.default: 1, _ATEN.baddbmm.default: 1, _ATEN.addmv.default: 1,
}  # fmt: skip
_LOST = 3.0  # see above
SEEDS = 2


class WorstProducts(TorchDispatchMode):
    """Within it, products of float32, bfloat16 and float16 are inexact as above. Those of float64 stay exact.

    bfloat16 and float16 are summed in float32 and rounded once. The errors depend on `seed` and the order of calls.
    Products inside custom operators and those written by `out=` are left as they are: it is for plain versions.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.used = False
        self._seed, self._generators = seed, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        before = _PRODUCTS.get(func)
        if before is None or args[before].dtype == torch.float64:
            return func(*args, **kwargs)
        self.used = True
        added = (args[0].double() * kwargs.get("beta", 1), kwargs.get("alpha", 1)) if before else None
        return self._product(args[before], args[before + 1], added)

    def _product(self, left: Tensor, right: Tensor, added: tuple[Tensor, float] | None) -> Tensor:
        exact, squares = left.double() @ right.double(), left.float().square() @ right.float().square()  # fp32: a size
        terms = left.shape[-1]
        if added is not None:
            bias, alpha = added
            exact, squares, terms = bias + alpha * exact, bias.square() + alpha**2 * squares, terms + 1
        size = exact.square().add_(squares).sqrt_().mul_(_LOST * torch.finfo(torch.float32).eps / 2 * terms**0.5)
        return size.mul_(self._luck(size)).add_(exact).to(left.dtype)

    def _luck(self, like: Tensor) -> Tensor:
        device = like.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return torch.randn(like.shape, generator=self._generators[device], device=device)


def in_the_worst_order(run: Callable[[], tuple[Tensor, ...]], seeds: int = SEEDS) -> tuple[Tensor, ...]:
    """The results of `run`, stacked over several runs with worst products: what the budgets take as `careful`.

    run: computes everything anew from its inputs, gradients included. Without a product one run is enough.
    """
    runs: list[tuple[Tensor, ...]] = []
    for seed in range(seeds):
        with WorstProducts(seed) as products:
            runs.append(tuple(tensor.detach() for tensor in run()))
        if not products.used:
            break
    return tuple(torch.stack(results) for results in zip(*runs, strict=True))

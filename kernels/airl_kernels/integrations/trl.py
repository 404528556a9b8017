"""TRL's trainers on our kernels: log-probabilities and entropy through `linear_logprob`.

    from airl_kernels.integrations import trl
    trl.patch()                 # before or after the trainer is made; trl.unpatch() undoes it

TRL 1.16 gives a model a fused head (`trl.trainer.utils.add_fused_lm_head`), which hands hidden states and the head's
weight to `ChunkedLogProbFunction.apply`. GRPOTrainer, RLOOTrainer and AsyncGRPOTrainer score every token that way.
`patch` replaces, wherever a loaded module holds them,

* `ChunkedLogProbFunction` by a function of the same arguments that calls `linear_logprob`. Its outputs besides the
  log-probability and the entropy (`is_top1`, `mean_logits`, `log_sum_sq_probs`, which SFT, DPO and KTO ask for) have
  no counterpart: calls that want them still go to TRL's own function, with one warning;
* `selective_log_softmax`, which takes given logits, by ours. Calls with several targets a row (top-k distillation)
  still go to TRL's own, with one warning;
* the test by which the fused head decides to drop ignored positions (labels of -100) before the projection. TRL does
  so on GPUs alone; here it does on the CPU too, so that no ignored row reaches a matrix product.

A frozen head, as under LoRA, costs two products of the vocabulary's size in place of TRL's three. Differences of
rounding are those of fp32 sums taken in another order; docs/integrations/trl.md lists the rest.
"""

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType, ModuleType

import torch
from torch import Tensor

from airl_kernels import linear_logprob, selective_log_softmax
from airl_kernels._common import require_plain_weight

SUPPORTED = "1.16"  # every release 1.16.x; 1.16.0 is the one tested

# What TRL 1.16 calls the seams with, in order. Another list means another meaning.
_HEAD_ARGUMENTS = (
    *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
    *("final_logit_softcapping", "logit_scale", "outputs"),
)
_SELECTIVE_ARGUMENTS = ("logits", "index", "temperature", "row_mask")
_OURS = {"log_probs", "entropy"}

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class Calls:
    """How often TRL came through the patched functions since `patch`.

    linear_logprob, selective_log_softmax: answered by our operations. left_to_trl: by TRL's own functions, for the
    reasons at the top of this file.
    """

    linear_logprob: int = 0
    selective_log_softmax: int = 0
    left_to_trl: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seam:
    """One object of TRL's and what stands in for it; in every loaded module, or in `only`."""

    original: object
    ours: object
    only: ModuleType | None = None


_seams: list[_Seam] = []
_calls = Calls()


def patch() -> None:
    """Send TRL's log-probabilities and entropies through airl_kernels, until `unpatch`. A second call does nothing.

    Raises RuntimeError when TRL is absent, is no release of 1.16, or lacks one of the functions to be replaced, or
    has it with other arguments. Nothing is changed then.
    """
    global _calls
    if _seams:
        return
    seams = _find_seams()
    _calls = Calls()
    for seam in seams:
        _replace(seam.original, seam.ours, seam.only)
    _seams.extend(seams)
    _log.info("TRL computes log-probabilities and entropies with airl_kernels (Triton kernels on CUDA tensors)")


def unpatch() -> None:
    """Put TRL's own functions back, also into modules that were imported after `patch`. Without `patch`, nothing."""
    for seam in _seams:
        _replace(seam.ours, seam.original, seam.only)
    _seams.clear()


@contextlib.contextmanager
def patched() -> Iterator[Callable[[], Calls]]:
    """`patch` for the length of a `with` block; inside another patch it changes nothing and undoes nothing.

    Yields `calls`.
    """
    inner = bool(_seams)
    patch()
    try:
        yield calls
    finally:
        if not inner:
            unpatch()


def calls() -> Calls:
    """A copy of the counts since the last `patch`. All zero after a training step means that TRL did not use it."""
    return Calls(**{name: getattr(_calls, name) for name in Calls.__slots__})


# ---- finding what to replace -----------------------------------------------------------------------------------


def _find_seams() -> list[_Seam]:
    """TRL's objects with our counterparts, after checking that they are what this file was written for."""
    try:
        import trl
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise RuntimeError(f"TRL is not installed; install trl=={SUPPORTED}.0.") from error
    version = trl.__version__
    if version.split(".")[:2] != SUPPORTED.split("."):
        raise RuntimeError(
            f"airl_kernels.integrations.trl supports TRL {SUPPORTED}, not {version}; install trl=={SUPPORTED}.0."
        )
    import trl.trainer.utils as utils

    head = _member(utils, "_ChunkedLogProbFunction", version)
    selective = _member(utils, "selective_log_softmax", version)
    compacts = _member(utils, "_use_triton", version)
    fused_head = _member(utils, "add_fused_lm_head", version)
    _check_arguments("ChunkedLogProbFunction.forward", getattr(head, "forward", None), _HEAD_ARGUMENTS, version)
    _check_arguments("selective_log_softmax", selective, _SELECTIVE_ARGUMENTS, version)
    _check_arguments("_use_triton", compacts, ("device",), version)
    missing = {"_ChunkedLogProbFunction", "_use_triton"} - _names(fused_head.__code__)
    if missing:
        raise RuntimeError(
            f"trl.trainer.utils.add_fused_lm_head of TRL {version} does not call {' or '.join(sorted(missing))}, so "
            f"patching would have no effect; install trl=={SUPPORTED}.0 as published."
        )
    return [
        _Seam(original=head, ours=_head_of(head)),
        _Seam(original=selective, ours=_selective_of(selective)),
        _Seam(original=compacts, ours=_compacts_of(compacts), only=utils),
    ]


def _member(module: ModuleType, name: str, version: str) -> Callable:
    found = getattr(module, name, None)
    if found is None:
        raise RuntimeError(
            f"{module.__name__} of TRL {version} has no {name} to replace; install trl=={SUPPORTED}.0 as published."
        )
    return found


def _check_arguments(name: str, function: Callable | None, expected: tuple[str, ...], version: str) -> None:
    found = () if function is None else tuple(inspect.signature(function).parameters)
    if found != expected:
        raise RuntimeError(
            f"{name} of TRL {version} takes ({', '.join(found)}), not ({', '.join(expected)}); "
            f"install trl=={SUPPORTED}.0 as published."
        )


def _names(code: CodeType) -> set[str]:
    """The globals and attributes that a function and the functions inside it name."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _replace(old: object, new: object, only: ModuleType | None) -> None:
    """Rebind every module-level name that holds `old`: `from trl... import name` made copies of the reference."""
    modules = [only] if only is not None else [m for m in list(sys.modules.values()) if isinstance(m, ModuleType)]
    for module in modules:
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


# ---- what stands in --------------------------------------------------------------------------------------------


def _head_of(original: type) -> type:
    class LinearLogProb:
        """`ChunkedLogProbFunction` as TRL uses it: a class with `apply`."""

        @staticmethod
        def apply(
            hidden: Tensor,
            weight: Tensor,
            bias: Tensor | None,
            targets: Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
        ) -> tuple[Tensor, Tensor | None, None, None, None]:
            """hidden [N, H], weight [V, H], bias [V] or None, targets int64 [N] -> f32 [N], f32 [N] or None, and
            None for TRL's three other outputs. chunk_size is TRL's; ours follows from the free memory."""
            others = tuple(sorted(set(outputs) - _OURS))
            if others:
                _leave(f"the outputs {', '.join(others)} of the fused head")
                settings = temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
                return original.apply(hidden, weight, bias, targets, *settings)
            _calls.linear_logprob += 1
            hidden, weight, bias = _one_dtype(hidden, weight, bias)
            wants_entropy = "entropy" in outputs
            result = linear_logprob(
                hidden,
                weight,
                targets,
                bias=bias,
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                entropy=wants_entropy,
            )
            logprobs, entropy = result if wants_entropy else (result, None)
            return logprobs, entropy, None, None, None

    return LinearLogProb


def _one_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The dtype of the hidden states, as TRL's own function chooses. Inside autocast `linear_logprob` casts, and keeps
    the gradient of a float32 weight in float32."""
    _require_whole(weight)
    if torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    return hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


def _require_whole(weight: Tensor) -> None:
    """Refuse weights that `Tensor.to` would turn into numbers that are not the head's."""
    require_plain_weight("the output layer's weight", weight)
    if getattr(weight, "quant_state", None) is not None or weight.dtype.itemsize < 2:
        raise TypeError(
            f"the output layer's weight is quantised ({type(weight).__name__}, {weight.dtype}); "
            "leave lm_head out of the quantisation, or dequantise it first."
        )
    if hasattr(weight, "ds_id"):
        raise RuntimeError(
            "the output layer's weight is partitioned by DeepSpeed ZeRO-3, which takes it away before the backward "
            "pass; use ZeRO stage 2, or train without airl_kernels.integrations.trl."
        )


def _selective_of(original: Callable) -> Callable:
    @functools.wraps(original)
    def selective(logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None) -> Tensor:
        """float32, as TRL's own Triton kernel returns; its fallback on the CPU returns the dtype of the logits."""
        if index.shape != logits.shape[:-1]:
            _leave("selective_log_softmax with several targets a row")
            return original(logits, index, temperature, row_mask)
        _calls.selective_log_softmax += 1
        targets = index.long()
        if row_mask is None:
            return selective_log_softmax(logits, targets, temperature=temperature)
        skipped = row_mask == 0  # a row whose gradient is 0 gets a gradient of 0, whatever it holds
        targets = targets.masked_fill(skipped, 0)
        return selective_log_softmax(logits, targets, temperature=temperature).masked_fill(skipped, 0.0)

    return selective


def _compacts_of(original: Callable) -> Callable:
    @functools.wraps(original)
    def compacts(device: torch.device) -> bool:
        return device.type == "cpu" or original(device)

    return compacts


_warned: set[str] = set()


def _leave(what: str) -> None:
    """Count a call that TRL answers itself, and say so once."""
    _calls.left_to_trl += 1
    if what not in _warned:
        _warned.add(what)
        _log.warning("TRL asks for %s, which airl_kernels does not compute: TRL's own function runs.", what)

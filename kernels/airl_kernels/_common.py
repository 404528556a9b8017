"""What every op family shares: argument checks with one-sentence errors, and the accumulation type."""

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

NAMESPACE = "airl_kernels"


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 when any input is float64 (gradcheck), otherwise float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast casts the inputs of a linear layer on this tensor's device to; None outside autocast.

    Autocast leaves float64 alone, and so does this.
    """
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def require_plain_weight(name: str, weight: object) -> None:
    """Reject what the kernels cannot read as one dense matrix: modules, DTensors, quantised weights."""
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, got {type(weight).__name__}; pass the layer's `.weight` "
            "(for a LoRA-wrapped head, the merged weight)."
        )
    if is_traceable_wrapper_subclass(weight):
        raise TypeError(f"{name} is a {type(weight).__name__}; pass a plain tensor (a DTensor's `full_tensor()`).")
    if not weight.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {weight.dtype}; quantised weights are not supported, dequantise it first.")


def require_floating(name: str, tensor: Tensor) -> None:
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must have a floating dtype, got {tensor.dtype}.")


def require_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {expected}, got {tensor.dtype}.")


def require_shape(name: str, tensor: Tensor, *shape: int) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}.")


def require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.")


def require_cu_seqlens(cu_seqlens: Tensor) -> None:
    require_dtype("cu_seqlens", cu_seqlens, torch.int32, torch.int64)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"cu_seqlens must have shape [S+1] with at least one entry, got {list(cu_seqlens.shape)}.")


def check_offsets(cu_seqlens: Tensor, num_tokens: int) -> None:
    """On the CPU, where reading costs nothing: offsets start at 0, never fall, and end at the number of tokens.

    CUDA tensors are not read (that would synchronise); wrong offsets there give unspecified values.
    """
    if cu_seqlens.device.type != "cpu" or isinstance(cu_seqlens, torch._subclasses.FakeTensor):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != num_tokens:
        raise ValueError(f"cu_seqlens must run from 0 to the number of tokens {num_tokens}, got {first} to {last}.")
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise ValueError("cu_seqlens must never decrease.")


def segment_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [N]: the sequence every packed token belongs to."""
    lengths = cu_seqlens.diff()
    ids = torch.arange(lengths.numel(), device=cu_seqlens.device)
    return ids.repeat_interleave(lengths, output_size=num_tokens)


def triton_kernels(family: str) -> ModuleType:
    """The Triton half of an op family, imported at the first CUDA tensor: `import airl_kernels` stays light."""
    try:
        return importlib.import_module(f".{family}_triton", __package__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise RuntimeError("airl_kernels needs Triton for CUDA tensors; install the `triton` package.") from error


def _tensors(arguments: Sequence[object]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from (item for item in argument if isinstance(item, Tensor))


def common_device(name: str, tensors: Sequence[Tensor]) -> torch.device:
    """The one device that all tensors are on. Raises ValueError when they are on several."""
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        places = sorted({str(tensor.device) for tensor in tensors})
        raise ValueError(f"{name} got tensors on {' and '.join(places)}; move all of them to one device.")
    return device


def current(device: torch.device) -> AbstractContextManager:
    """Makes a CUDA device the current one inside: Triton launches there, whatever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


# Every op by name, with what runs for CUDA tensors: launched on CPU tensors, that is a test of the kernels.
DEFINED: dict[str, tuple[torch.library.CustomOpDef, Callable]] = {}


def define_op(family: str, reference: Callable, *, mutates: tuple[str, ...] = ()) -> torch.library.CustomOpDef:
    """The custom op `airl_kernels::<name>` of `<name>_reference`: the reference on every device, Triton on CUDA.

    The Triton half is the function <name> of `<family>_triton.py`, with the same arguments; it runs with the tensors'
    device as the current one. float64, which exists for gradient checks, runs the reference on CUDA as well.
    """
    name = reference.__name__.removesuffix("_reference")
    op = torch.library.custom_op(f"{NAMESPACE}::{name}", reference, mutates_args=mutates)

    @op.register_kernel("cuda")
    def on_cuda(*args):
        tensors = list(_tensors(args))
        device = common_device(name, tensors)
        if any(tensor.dtype == torch.float64 for tensor in tensors):
            return reference(*args)
        with current(device):
            return getattr(triton_kernels(family), name)(*args)

    DEFINED[name] = op, on_cuda
    return op


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; the H200's 132 for "meta" tensors, few for the interpreter on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 2

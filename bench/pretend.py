"""A GPU that is not there: code written for CUDA runs through, on tensors without numbers, up to its launches.

    with pretend_gpu():
        x = torch.randn(4, 8, device="cuda")    # a "meta" tensor that says it is on cuda:0

Tensors have shapes, types, strides and aligned addresses, so that all that follows from those (tiles, buffers, the
specialisation of a kernel) is as on a GPU. What a program asks of numbers gets an invented answer: a flag is true, a
number 1, a tensor brought to the CPU holds ones, and of what it picks by a mask every second row is there. The custom
ops of airl_kernels run what is registered for CUDA. Nothing touches a driver, with or without a GPU in the machine.
"""

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_META = torch.device("meta")
_MEMORY = 80 * 2**30  # of an H100; the H200 has as many multiprocessors, and more memory
_BASE = 1 << 40  # where every storage begins: torch's allocator aligns to 512 bytes
_TENSOR = torch._C.TensorBase


@contextlib.contextmanager
def pretend_gpu(arch: int = 90) -> Iterator[None]:
    """arch: the compute capability that the device names, times ten."""
    with contextlib.ExitStack() as stack:
        for target, name, value in _replacements(arch):
            stack.enter_context(patch.object(target, name, value, create=True))
        stack.enter_context(_Invent())
        stack.enter_context(_OnMeta())
        yield


# ---- devices ---------------------------------------------------------------------------------------------------


def _is_cuda(value: object) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


class _OnMeta(TorchFunctionMode):
    """Every mention of a CUDA device becomes "meta"; generators, which meta tensors cannot have, are left out."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.device:
            return function(*args, **kwargs)
        if function is _TENSOR.cuda:
            return args[0].to(_META)
        args = tuple(_META if _is_cuda(value) else value for value in args)
        kwargs = {name: _META if _is_cuda(value) else value for name, value in kwargs.items()}
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if kwargs.get("device") == _META or any(map(_on_meta, args[:1])):
            kwargs.pop("generator", None)
        return function(*args, **kwargs)


class _Generator(torch.Generator):
    """The CPU's, also for CUDA, whose own needs a GPU."""

    def __new__(cls, device: object = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")


_inside_torch = 0  # torch's own "meta" implementations are Python too, and must see the device that is


def _device(tensor: torch.Tensor) -> torch.device:
    device = _TENSOR.device.__get__(tensor)
    return CUDA if device == _META and not _inside_torch else device


def _address(tensor: torch.Tensor) -> int:
    if _TENSOR.device.__get__(tensor) != _META:
        return _TENSOR.data_ptr(tensor)
    return _BASE + tensor.storage_offset() * tensor.element_size()


def _replacements(arch: int) -> Iterator[tuple[object, str, object]]:
    """What Python code asks about tensors and about the device."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3 (pretended)", major=arch // 10, minor=arch % 10, total_memory=_MEMORY,
        multi_processor_count=132, L2_cache_size=50 << 20, regs_per_multiprocessor=65536,
        shared_memory_per_multiprocessor=228 << 10, shared_memory_per_block_optin=227 << 10,
        max_threads_per_multi_processor=2048, warp_size=32,
    )  # fmt: skip
    yield torch.Tensor, "device", property(_device)
    yield torch.Tensor, "is_cuda", property(lambda tensor: _device(tensor).type == "cuda")
    yield torch.Tensor, "data_ptr", _address
    yield torch.Tensor, "pin_memory", lambda tensor, *_: tensor
    yield ThreadPoolExecutor, "submit", _at_once
    yield torch, "Generator", _Generator
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "synchronize": None,
        "init": None, "_lazy_init": None, "empty_cache": None, "memory_allocated": 0, "memory_reserved": 0,
        "max_memory_allocated": 0, "reset_peak_memory_stats": None, "mem_get_info": (_MEMORY, _MEMORY),
        "get_device_properties": properties, "get_device_name": properties.name,
        "get_device_capability": (arch // 10, arch % 10), "is_bf16_supported": True,
        "is_current_stream_capturing": False, "current_stream": _Stream(), "default_stream": _Stream(),
        "set_sync_debug_mode": None, "set_device": None, "manual_seed_all": None, "manual_seed": None, "_sleep": None,
        "_exchange_device": 0, "_maybe_exchange_device": 0, "get_rng_state": torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": None, "get_rng_state_all": [], "memory_stats": {},
    }  # fmt: skip
    for name, answer in answers.items():
        yield torch.cuda, name, _always(answer)
    for name in ("device", "_DeviceGuard", "stream", "graph", "StreamContext", "device_of"):
        yield torch.cuda, name, _Nothing
    for name in ("CUDAGraph", "Event", "Stream"):
        yield torch.cuda, name, _Stream


def _always(answer: object) -> Callable[..., object]:
    return lambda *args, **kwargs: answer


def _at_once(pool: ThreadPoolExecutor, call: Callable[..., object], /, *args: object, **kwargs: object) -> Future:
    """In the calling thread: torch's modes are of a thread."""
    future: Future = Future()
    try:
        future.set_result(call(*args, **kwargs))
    except Exception as error:
        future.set_exception(error)
    return future


class _Nothing(contextlib.nullcontext):
    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__()


class _Stream:
    """A stream, an event or a graph: any method does nothing; any two events are a millisecond apart."""

    cuda_stream = device_index = 0
    device = CUDA

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def elapsed_time(self, other: object) -> float:
        return 1.0

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


# ---- numbers ---------------------------------------------------------------------------------------------------

_aten = torch.ops.aten


class _Invent(TorchDispatchMode):
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if _is_cuda(kwargs.get("device")):  # the other mode is off inside a call, such as that of autograd
            kwargs["device"] = _META
        if op.namespace == "airl_kernels" and any(map(_on_meta, args)):
            from airl_kernels._common import DEFINED

            with self, _OnMeta():  # torch switches both off in here
                return DEFINED[op._schema.name.split("::")[1]][1](*args, **kwargs)
        global _inside_torch
        _inside_torch += 1
        try:
            answer = _ANSWERS.get(op)
            if answer is not None and any(map(_on_meta, args[:2])):
                return answer(*args, **kwargs)
            return op(*args, **kwargs)
        finally:
            _inside_torch -= 1


def _on_meta(value: object) -> bool:
    return isinstance(value, torch.Tensor) and _TENSOR.device.__get__(value) == _META


def _scalar(tensor: torch.Tensor) -> bool | int | float:
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _to_copy(tensor: torch.Tensor, **kwargs: object) -> torch.Tensor:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cpu":
        return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
    return _aten._to_copy.default(tensor, **kwargs)


def _copy_(target: torch.Tensor, source: torch.Tensor, *_: object) -> torch.Tensor:
    return target if _on_meta(target) else target.fill_(1)


def _nonzero(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty((-(-tensor.numel() // 2), tensor.dim()), dtype=torch.int64, device=_META)


def _index(op: object, tensor: torch.Tensor, indices: list, *rest: object, **kwargs: object) -> torch.Tensor:
    """Masks become the rows that they pick."""
    picked = []
    for index in indices:
        masks = index is not None and index.dtype in (torch.bool, torch.uint8)
        picked += _nonzero(index).unbind(1) if masks else [index]
    return op(tensor, picked, *rest, **kwargs)


def _product(tensor: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, **kwargs: object):
    """`addmm` with an output type, which has no "meta" implementation."""
    out = kwargs.get("out")
    return left.new_empty(left.shape[0], right.shape[1], dtype=dtype) if out is None else out


def _flash(query: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, ...]:
    """Packed attention, whose "meta" implementation asks the driver: output, logsumexp, and the state of no dropout."""
    state = query.new_empty(2, dtype=torch.uint64)
    sums = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)
    return torch.empty_like(query), sums, state, query.new_empty(0), query.new_empty(0)


def _repeats(repeats: torch.Tensor, *, output_size: int | None = None) -> torch.Tensor:
    return repeats.new_empty(repeats.numel() if output_size is None else output_size, dtype=torch.int64)


_ANSWERS = {
    _aten._local_scalar_dense.default: _scalar,
    _aten.item.default: _scalar,
    _aten.is_nonzero.default: lambda tensor: True,
    _aten.equal.default: lambda *_: True,
    _aten._to_copy.default: _to_copy,
    _aten.copy_.default: _copy_,
    _aten.nonzero.default: _nonzero,
    _aten.masked_select.default: lambda tensor, mask: tensor.new_empty(-(-mask.numel() // 2)),
    _aten.repeat_interleave.Tensor: _repeats,
    _aten._flash_attention_forward.default: _flash,
    _aten._flash_attention_backward.default: lambda grad, q, k, v, *_, **__: tuple(map(torch.empty_like, (q, k, v))),
    _aten.addmm.dtype: _product,
    _aten.addmm.dtype_out: _product,
    _aten.index.Tensor: lambda *args: _index(_aten.index.Tensor, *args),
    _aten.index_put.default: lambda *args, **kwargs: _index(_aten.index_put.default, *args, **kwargs),
    _aten.index_put_.default: lambda *args, **kwargs: _index(_aten.index_put_.default, *args, **kwargs),
    _aten._index_put_impl_.default: lambda *args, **kwargs: _index(_aten._index_put_impl_.default, *args, **kwargs),
}

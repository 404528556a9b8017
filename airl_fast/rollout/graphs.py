"""Steps of fixed shape as CUDA graphs: warmed up by running, captured once a shape, replayed from then on.

A captured step reads and writes the tensors that it read and wrote when it was captured, so all of them must outlive
it, and nothing in it may ask the device. The graphs share one pool of memory: they run one after the other.
"""

import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from airl_fast.errors import UserError

_WARM = 2  # runs of a shape before it is captured; they are steps like any other
# All but cuDNN's, torch's first choice on an H100: it plans every shape anew, and a decoding step is a new shape.
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Graphs:
    """Runs `step(*shape)`, as a graph where it has been run with that shape before.

    It keeps no reference to the step, so that whoever owns both is freed with its memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, _stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._runs: Counter[tuple[int, ...]] = Counter()
        self._captured: dict[tuple[int, ...], torch.cuda.CUDAGraph] = {}

    @property
    def captured(self) -> int:
        return len(self._captured)

    def __call__(self, step: Callable[..., None], *shape: int) -> None:
        with torch.cuda.device(self._device):
            if shape not in self._captured:
                if self._runs[shape] < _WARM:
                    self._runs[shape] += 1
                    with self._beside():
                        step(*shape)
                    return
                self._captured[shape] = self._capture(step, shape)
            self._captured[shape].replay()

    def _capture(self, step: Callable[..., None], shape: tuple[int, ...]) -> torch.cuda.CUDAGraph:
        """UserError for a step that cannot be captured."""
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: other threads (the discriminator's update beside a rollout) may do as they like meanwhile.
            with (
                _no_collection(),
                sdpa_kernel(ATTENTION),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                step(*shape)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails to end leaves its own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise UserError(
                f"rollout.engine=builtin: a decoding step cannot be captured as a CUDA graph ({reason}); "
                "set rollout.cuda_graphs=false."
            ) from error
        return graph

    @contextmanager
    def _beside(self) -> Iterator[None]:
        """On the stream that captures: its libraries' workspaces are then made before they are captured."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), sdpa_kernel(ATTENTION):
            yield
        current.wait_stream(self._stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace, 32 MiB on an H100, for every stream that it has seen."""
    return torch.cuda.Stream(device)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A collector that freed GPU memory in the middle would end the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

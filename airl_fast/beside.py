"""Work on a thread beside the main one: what the host can prepare, or train, while the device is busy elsewhere."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch


class Beside:
    """One piece of work at a time. On CUDA it has a stream of its own, which begins after what was queued before
    `start` and which the main stream waits for in `take`."""

    def __init__(self, device: torch.device, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._running: Future | None = None
        self._arguments: tuple = ()  # kept until `take`: their memory must not be reused before the stream is done

    def start(self, work: Callable[..., Any], *arguments: Any) -> None:
        if self._running is not None:
            raise RuntimeError("the last piece of work was not taken")
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        self._arguments = arguments
        self._running = self._pool.submit(self._run, work)

    def wait(self) -> None:
        """Until the work is done; its result stays to be taken. Raises what it raised."""
        if self._running is not None:
            self._running.result()

    def take(self) -> Any:
        """The result, None when nothing was started."""
        if self._running is None:
            return None
        running, self._running = self._running, None
        result = running.result()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
        self._arguments = ()
        return result

    def _run(self, work: Callable[..., Any]) -> Any:
        with torch.cuda.stream(self._stream):  # does nothing without one
            return work(*self._arguments)

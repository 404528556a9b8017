"""Milliseconds of a call. Backends take turns, so that a machine that slows down slows all of them alike.

CUDA: events around each sample, with the device kept busy until the host has queued the whole sample: what is
measured is the device's time, not Python's. CPU: the clock. Samples of short calls hold several of them.
Inputs rotate through sets that together exceed the cache.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

_SAMPLE_SECONDS = {"cuda": 0.5e-3, "cpu": 2e-3}  # a sample lasts at least this long
_MOST_CALLS = 64
_CYCLES_PER_SECOND = 2.0e9  # of the clock that torch.cuda._sleep counts in, about
_LONGEST_SLEEP = 0.05
_CPU_CACHE = 32 << 20  # sets exceed twice this; the last-level cache of a shared machine has no such size


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Milliseconds per call: quantiles over `samples` samples."""

    p20: float
    median: float
    p80: float
    samples: int


Call = Callable[[int], object]  # takes the number of the input set


def cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else _CPU_CACHE


def sets_needed(num_bytes: int, device: torch.device, most: int = 256) -> int:
    """How many sets of inputs exceed twice the cache, when a call moves num_bytes."""
    return max(1, min(most, math.ceil(2 * cache_bytes(device) / max(num_bytes, 1))))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    calls: Mapping[str, Call], device: torch.device, *, num_sets: int = 1, seconds: float = 0.5, most: int = 50
) -> dict[str, Timing]:
    """Time every call for about `seconds`, at least 5 and at most `most` samples; 3 of a call longer than a second."""
    plans = {name: _Sampler(call, device, num_sets) for name, call in calls.items()}
    wanted = {name: plan.samples_within(seconds, most) for name, plan in plans.items()}
    samples: dict[str, list[float]] = {name: [] for name in plans}
    for turn in range(max(wanted.values(), default=0)):
        for name, plan in plans.items():
            if turn < wanted[name]:
                samples[name].append(plan.sample())
    return {name: summarise(values) for name, values in samples.items()}


def summarise(samples: Sequence[float]) -> Timing:
    """Quantiles interpolate between samples."""
    low, middle, high = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Timing(p20=low.item(), median=middle.item(), p80=high.item(), samples=len(samples))


class _Sampler:
    """One call, warmed up, with the number of calls in a sample fixed."""

    def __init__(self, call: Call, device: torch.device, num_sets: int) -> None:
        self.call, self.device, self.num_sets = call, device, num_sets
        self.next, self.calls, self.host_seconds = 0, 1, 0.0
        start = time.perf_counter()
        first = self.sample()  # with compilation, where there is any
        slow = time.perf_counter() - start > 1.0
        self.estimate = min(first if slow else self.sample(), self.sample()) / 1e3
        self.calls = min(_MOST_CALLS, math.ceil(_SAMPLE_SECONDS[device.type] / max(self.estimate, 1e-9)))

    def samples_within(self, seconds: float, most: int) -> int:
        fewest = 3 if self.estimate > 1.0 else 5
        return max(fewest, min(most, int(seconds / (self.estimate * self.calls))))

    def sample(self) -> float:
        """Milliseconds per call."""
        first, self.next = self.next, self.next + self.calls
        numbers = [(first + k) % self.num_sets for k in range(self.calls)]
        if self.device.type != "cuda":
            start = time.perf_counter()
            for number in numbers:
                self.call(number)
            return (time.perf_counter() - start) * 1e3 / self.calls
        return self._cuda_sample(numbers)

    def _cuda_sample(self, numbers: Sequence[int]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        sleep = min(1.5 * self.host_seconds * self.calls, _LONGEST_SLEEP)
        if sleep:
            torch.cuda._sleep(int(sleep * _CYCLES_PER_SECOND))
        before.record()
        start = time.perf_counter()
        for number in numbers:
            self.call(number)
        host = time.perf_counter() - start
        after.record()
        after.synchronize()
        # A call that waits for the device counts its own sleep; the shortest seen is the nearest to the host's work.
        seen = host / self.calls
        self.host_seconds = min(self.host_seconds, seen) if self.host_seconds else seen
        return before.elapsed_time(after) / self.calls

"""The most memory that a call holds at once beyond its inputs: temporaries, results and gradients."""

import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start and stop on stderr otherwise


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """MiB (2^20 bytes) of tensors alive at once during `run`, beyond what was alive before. Call it warmed up."""
    return (_cuda(run, device) if device.type == "cuda" else _cpu(run)) / (1 << 20)


def _cuda(run: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del kept
    return peak


def _cpu(run: Callable[[], object]) -> int:
    """PyTorch has no peak counter for the CPU; its profiler reports every allocation and release."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = run()
    alive = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    del kept
    return peak

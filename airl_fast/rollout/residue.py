"""Loading vLLM changes the process it is loaded into; here it is changed back."""

import os
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def restored(**environment: str) -> Iterator[None]:
    """Run the block with these environment variables where the user has not set them. Afterwards the environment, the
    random generators' states, torch's thread count (and the function that sets it, which vLLM replaces on the CPU) and
    its default dtype are what they were before."""
    before, set_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    dtype, states = torch.get_default_dtype(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    device = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None  # the current one's
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if device is not None:
            torch.cuda.set_rng_state(device)

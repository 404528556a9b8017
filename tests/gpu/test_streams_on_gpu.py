"""Work beside the default stream: what is queued on one stream is read in order, and its memory is not reused early."""

import pytest
import torch

from tests.gpu.device import DEVICE, gpu_only, needs_device

microbatch = pytest.importorskip("airl_fast.microbatch", reason="needs the trainer's sources")
from airl_fast.beside import Beside  # noqa: E402  (after the check that it is there)
from airl_fast.pack import pack  # noqa: E402
from airl_fast.types import Kind, Trace, TraceBatch  # noqa: E402

pytestmark = [needs_device, gpu_only]
_BUSY = 400_000_000  # cycles, about a fifth of a second: longer than the host needs to queue all the rest


def batch_of(count: int = 12) -> TraceBatch:
    traces = [
        Trace(kind=Kind.POLICY, group=s, prompt_tokens=(1, 2, 3, 4, 5), tokens=tuple(range(4 + s)), text="")
        for s in range(count)
    ]
    return pack(traces, torch.device(DEVICE))


@pytest.mark.parametrize("budget", [40, 10_000], ids=["cut", "whole"])
def test_micro_batches_are_prepared_on_the_stream_that_reads_them(budget):
    batch = batch_of()
    wanted = batch.labels.float()
    tokens = microbatch.TokenBudget(tokens=budget, key="budget")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        with torch.cuda.stream(torch.cuda.default_stream()):
            torch.cuda._sleep(_BUSY)  # whatever is queued there comes too late
        found = microbatch.over_tokens(batch, tokens, lambda part: part.labels.float())
    torch.cuda.synchronize()
    torch.testing.assert_close(found, wanted)


def test_what_work_was_given_is_not_overwritten_before_it_is_done():
    beside = Beside(torch.device(DEVICE), "test")

    def work(numbers: torch.Tensor) -> torch.Tensor:
        torch.cuda._sleep(_BUSY)
        return numbers.sum()

    given = torch.ones(1 << 20, device=DEVICE)
    torch.cuda.synchronize()
    beside.start(work, given)
    beside.wait()  # for the host's part; the device sleeps
    del given
    torch.full((1 << 20,), 7.0, device=DEVICE)  # would take its place
    assert beside.take().item() == 1 << 20

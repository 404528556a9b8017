"""Requests that arrive together share one forward pass. One thread owns model and tokenizer; nobody else calls them.

The thread takes the first request, waits a few milliseconds for others that are on their way, and stops at a budget of
tokens. While a pass runs, requests gather for the next one. Traces never attend to each other, so a result depends on
the request alone (to float rounding).
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace

from airl_fast.data.trace_rows import TraceRow
from airl_fast.errors import UserError
from airl_fast.judge.judge import Judge, Scored
from airl_fast.measures.localise import TokenValues
from airl_fast.serve.errors import ServiceError
from airl_fast.types import Example, Trace

log = logging.getLogger(__name__)

Answer = Callable[[Scored, Sequence[Example]], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchStats:
    """One forward pass: how many requests, traces and tokens (prompts included) it held, and how long it took."""

    requests: int
    traces: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A request, read. examples: one a trace, at the trace's group."""

    traces: tuple[Trace, ...]
    examples: tuple[Example, ...]
    step_ends: tuple[tuple[int, ...] | None, ...]
    tokens: int
    answer: Answer
    future: Future


class Batcher:
    """submit() from any thread. tokens: of one forward pass, prompts included; a request larger than that has a pass
    of its own, and 1 gives every request its own. wait: seconds that a first request waits for others. in_progress():
    how many requests the service is at work on, submitted or about to be; a pass that has them all waits for no other.
    """

    def __init__(
        self,
        judge: Judge,
        *,
        tokens: int,
        wait: float,
        in_progress: Callable[[], int],
        observe: Callable[[BatchStats], None],
    ) -> None:
        self._judge, self._tokens, self._wait = judge, tokens, wait
        self._in_progress, self._observe = in_progress, observe
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Requests that no pass has taken up yet."""
        return self._queue.qsize()

    def submit(self, rows: Sequence[TraceRow], answer: Answer) -> Future:
        """The future of the answer's bytes. It raises ServiceError for a trace that cannot be read. Cancelled before
        its pass begins, the request costs nothing.

        answer: makes the response from the request's own traces, in the order of `rows`; runs on the model's thread.
        """
        future: Future = Future()
        self._queue.put((tuple(rows), answer, future))
        return future

    def close(self) -> None:
        """Answer what is in the queue, then end the thread."""
        self._queue.put(None)
        self._thread.join()

    # ---- the model's thread ----

    def _work(self) -> None:
        held: _Job | None = None
        open_ = True
        while open_ or held is not None:
            jobs: list[_Job] = [] if held is None else [held]
            held, deadline = None, time.monotonic() + (self._wait if jobs else 0.0)
            while open_ and held is None and sum(job.tokens for job in jobs) < self._tokens:
                if jobs and self._in_progress() <= len(jobs):
                    break
                try:
                    taken = self._queue.get(timeout=self._left(deadline) if jobs else None)
                except queue.Empty:
                    break
                if taken is None:
                    open_ = False
                    break
                job = self._read(*taken)
                if job is None:
                    continue
                if not jobs:
                    deadline = time.monotonic() + self._wait
                if jobs and sum(each.tokens for each in jobs) + job.tokens > self._tokens:
                    held = job
                else:
                    jobs.append(job)
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                self._pass(jobs)

    @staticmethod
    def _left(deadline: float) -> float:
        return max(deadline - time.monotonic(), 0.0)

    def _read(self, rows: tuple[TraceRow, ...], answer: Answer, future: Future) -> _Job | None:
        """The request as traces of the policy's tokens; None when it was given up or cannot be read."""
        if future.cancelled():
            return None
        try:
            examples = tuple(Example(id=row.id, prompt=row.prompt, answer="") for row in rows)
            traces = []
            for group, (row, example) in enumerate(zip(rows, examples, strict=True)):
                traces.append(self._trace(row, example, group, examples))
            return _Job(
                traces=tuple(traces),
                examples=examples,
                step_ends=tuple(row.step_ends for row in rows),
                tokens=sum(len(trace.prompt_tokens) + len(trace.tokens) for trace in traces),
                answer=answer,
                future=future,
            )
        except Exception as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            return None

    def _trace(self, row: TraceRow, example: Example, group: int, examples: Sequence[Example]) -> Trace:
        try:
            trace = self._judge.trace(example, group, row.text)
        except UserError as error:
            raise ServiceError(422, "invalid_request", str(error), row.place) from None
        excess = self._judge.excess([trace], examples)
        if excess is not None:
            raise ServiceError(422, "too_long", f"{excess}; shorten it or leave it out.", row.place)
        return trace

    def _pass(self, jobs: Sequence[_Job]) -> None:
        """Score several requests at once. If that fails, each runs alone: none may fail through its neighbours."""
        began = time.monotonic()
        traces: list[Trace] = []
        for job in jobs:
            shift = len(traces)
            traces += [replace(trace, group=trace.group + shift) for trace in job.traces]
        examples = [example for job in jobs for example in job.examples]
        try:
            scored = self._judge.score(traces, examples, [ends for job in jobs for ends in job.step_ends])
        except Exception as error:
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            log.warning("a pass over %d requests failed (%s); each is run alone", len(jobs), error)
            for job in jobs:
                self._pass([job])
            return
        tokens, seconds = sum(job.tokens for job in jobs), time.monotonic() - began
        self._observe(BatchStats(requests=len(jobs), traces=len(traces), tokens=tokens, seconds=seconds))
        start = 0
        for job in jobs:
            own = cut_scored(scored, start, job.traces)
            start += len(job.traces)
            try:
                job.future.set_result(job.answer(own, job.examples))
            except Exception as error:
                job.future.set_exception(error)


def cut_scored(scored: Scored, start: int, traces: Sequence[Trace]) -> Scored:
    """The part of a pass that belongs to one request: `traces`, which stand at `start` and after in it."""
    stop = start + len(traces)
    return Scored(
        traces=tuple(traces), reward=_cut(scored.reward, start, stop), logprob=_cut(scored.logprob, start, stop)
    )


def _cut(values: TokenValues, start: int, stop: int) -> TokenValues:
    offsets = values.offsets[start : stop + 1]
    inside = slice(offsets[0], offsets[-1])
    return TokenValues(
        values=values.values[inside],
        offsets=offsets - offsets[0],
        step_ends=values.step_ends[inside],
        answer_mask=None if values.answer_mask is None else values.answer_mask[inside],
    )

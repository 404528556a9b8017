"""Counts of the service in Prometheus' text format (version 0.0.4)."""

import threading
from collections import Counter
from collections.abc import Iterator

from airl_fast.serve.batching import BatchStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds


class Metrics:
    """Written by the event loop and by the model's thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._responses: Counter[tuple[str, int]] = Counter()
        self._slower: Counter[tuple[str, float]] = Counter()  # requests of at most so many seconds
        self._seconds: Counter[str] = Counter()
        self._passes, self._batched, self._traces, self._tokens, self._busy = 0, 0, 0, 0, 0.0

    def answered(self, path: str, status: int, seconds: float) -> None:
        with self._lock:
            self._responses[path, status] += 1
            self._seconds[path] += seconds
            for bound in _BOUNDS:
                if seconds <= bound:
                    self._slower[path, bound] += 1

    def scored(self, stats: BatchStats) -> None:
        with self._lock:
            self._passes += 1
            self._batched += stats.requests
            self._traces += stats.traces
            self._tokens += stats.tokens
            self._busy += stats.seconds

    def text(self, *, waiting: int, in_flight: int, uptime: float) -> str:
        with self._lock:
            return "\n".join(self._lines(waiting, in_flight, uptime)) + "\n"

    def _lines(self, waiting: int, in_flight: int, uptime: float) -> Iterator[str]:
        yield from _head("airl_requests_total", "counter", "Responses by path and status.")
        for (path, status), count in sorted(self._responses.items()):
            yield f'airl_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _head("airl_errors_total", "counter", "Responses with a status of 400 and more.")
        yield f"airl_errors_total {sum(n for (_, status), n in self._responses.items() if status >= 400)}"
        yield from _head("airl_request_seconds", "histogram", "From a request's arrival to its response.")
        for path, seconds in sorted(self._seconds.items()):
            total = sum(n for (each, _), n in self._responses.items() if each == path)
            for bound in _BOUNDS:
                yield f'airl_request_seconds_bucket{{path="{path}",le="{bound}"}} {self._slower[path, bound]}'
            yield f'airl_request_seconds_bucket{{path="{path}",le="+Inf"}} {total}'
            yield f'airl_request_seconds_sum{{path="{path}"}} {seconds:.6f}'
            yield f'airl_request_seconds_count{{path="{path}"}} {total}'
        for name, kind, meaning, value in (
            ("airl_passes_total", "counter", "Forward passes.", self._passes),
            ("airl_batched_requests_total", "counter", "Requests in those passes.", self._batched),
            ("airl_traces_total", "counter", "Traces scored.", self._traces),
            ("airl_tokens_total", "counter", "Tokens read, prompts included.", self._tokens),
            ("airl_model_seconds_total", "counter", "Seconds spent in forward passes.", round(self._busy, 6)),
            ("airl_queue_length", "gauge", "Requests that no pass has taken up yet.", waiting),
            ("airl_in_flight", "gauge", "Requests being read, waiting or being computed.", in_flight),
            ("airl_uptime_seconds", "gauge", "Seconds since the service began.", round(uptime, 3)),
        ):
            yield from _head(name, kind, meaning)
            yield f"{name} {value}"


def _head(name: str, kind: str, meaning: str) -> tuple[str, str]:
    return f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"

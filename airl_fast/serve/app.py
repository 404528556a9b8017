"""The paths of the service. Scripts from elsewhere are not wanted on a machine without internet, so FastAPI's pages
/docs and /redoc, which load theirs from a CDN, are off; /openapi.json describes everything."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI, Response
from pydantic import BaseModel

from airl_fast.data.trace_rows import TraceRow, parse_trace
from airl_fast.device import ops_backend
from airl_fast.errors import UserError
from airl_fast.judge.judge import Judge
from airl_fast.judge.locate import Thresholds
from airl_fast.measures.rerank import Scorer
from airl_fast.serve.answers import (
    LocalizeOut,
    RerankOut,
    ScoreOut,
    localize_answer,
    rerank_answer,
    score_answer,
)
from airl_fast.serve.batching import Answer, Batcher
from airl_fast.serve.errors import ServiceError, error_schemas, handle_errors
from airl_fast.serve.guard import Guard, Limits
from airl_fast.serve.metrics import CONTENT_TYPE, Metrics
from airl_fast.serve.schema import LocalizeRequest, RerankRequest, ScoreRequest, TraceIn

_REFUSALS = (400, 401, 408, 413, 415, 422, 500, 503, 504)


class HealthOut(BaseModel):
    """status: ok, or failed when the model's thread has ended (status 503)."""

    status: str
    version: str
    run: str
    task: str
    policy: str
    discriminator: str
    parameters: int
    dtype: str
    device: str
    ops: str
    scorer: Scorer
    rule: str
    threshold: float | None
    batch_tokens: int
    max_traces: int
    queue_length: int
    in_flight: int
    uptime_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """token: a bearer token that requests must carry. batch_tokens, batch_wait: see `Batcher`."""

    limits: Limits
    token: str | None
    batch_tokens: int
    batch_wait: float


@dataclass(slots=True, kw_only=True)
class _Service:
    """What the paths work with. run: the name of the run's directory."""

    judge: Judge
    thresholds: Thresholds
    run: str
    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    began: float = field(default_factory=time.monotonic)
    guard: Guard | None = None
    batcher: Batcher | None = None

    async def compute(self, rows: Sequence[TraceRow], answer: Answer) -> Response:
        limits = self.settings.limits
        if len(rows) > limits.traces:
            message = f"{len(rows)} traces, more than the {limits.traces} of --max-traces; send them in parts."
            raise ServiceError(422, "too_many_traces", message)
        future = asyncio.wrap_future(self.batcher.submit(rows, answer))
        try:
            content = await asyncio.wait_for(future, limits.timeout)
        except TimeoutError:
            message = f"no answer within {limits.timeout:g} s (--timeout); send fewer traces, or try again later."
            raise ServiceError(504, "timeout", message) from None
        return Response(content, media_type="application/json")


def make_app(judge: Judge, thresholds: Thresholds, run: str, settings: Settings) -> FastAPI:
    """The ASGI application. thresholds: of `locate.calibrate`; empty when there are none."""
    service = _Service(judge=judge, thresholds=thresholds, run=run, settings=settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.batcher = Batcher(
            judge,
            tokens=settings.batch_tokens,
            wait=settings.batch_wait,
            in_progress=lambda: service.guard.in_flight,
            observe=service.metrics.scored,
        )
        yield
        await asyncio.to_thread(service.batcher.close)

    app = FastAPI(
        title="airl-fast",
        description="A reward learned from demonstrations (adversarial IRL), as a service.",
        version=version("airl-fast"),
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )

    def guarded(inner: FastAPI) -> Guard:
        service.guard = Guard(inner, settings.limits, settings.token, service.metrics)
        return service.guard

    app.add_middleware(guarded)
    handle_errors(app)
    _add_work(app, service)
    _add_state(app, service)
    return app


def _add_work(app: FastAPI, service: _Service) -> None:
    judge, evaluate = service.judge, service.judge.config.evaluate
    errors = error_schemas(*_REFUSALS)

    @app.post("/score", response_model=ScoreOut, responses=errors, summary="Token, step and trace rewards")
    async def score(request: ScoreRequest) -> Response:
        def answer(scored, examples) -> bytes:
            return _bytes(score_answer(judge, scored, examples))

        return await service.compute(trace_rows(request.traces), answer)

    @app.post("/rerank", response_model=RerankOut, responses=errors, summary="Order candidates, and let them vote")
    async def rerank(request: RerankRequest) -> Response:
        rows = [
            TraceRow(
                id=f"prompts.{p}.completions.{c}",
                place=f"prompts.{p}.completions.{c}",
                prompt=prompt.prompt,
                text=completion,
            )
            for p, prompt in enumerate(request.prompts)
            for c, completion in enumerate(prompt.completions)
        ]
        ids = [f"prompts.{p}" if each.id is None else str(each.id) for p, each in enumerate(request.prompts)]
        counts = [len(each.completions) for each in request.prompts]
        scorer = request.scorer or evaluate.scorer

        def answer(scored, examples) -> bytes:
            return _bytes(rerank_answer(judge, scored, examples, ids, counts, scorer))

        return await service.compute(rows, answer)

    @app.post(
        "/localize",
        response_model=LocalizeOut,
        responses=errors | error_schemas(409),
        summary="The first wrong step, and how suspicious each is",
    )
    async def localize(request: LocalizeRequest) -> Response:
        settings = evaluate.model_copy(update={"localise": request.rule or evaluate.localise})
        if settings.localise == "first_below" and "reward" not in service.thresholds:
            message = "rule first_below has no threshold, because the run's training data was not there to calibrate "
            raise ServiceError(409, "not_calibrated", message + "it; ask for largest_drop or argmin.", "rule")

        def answer(scored, examples) -> bytes:
            return _bytes(localize_answer(judge, scored, examples, settings, service.thresholds))

        return await service.compute(trace_rows(request.traces), answer)


def _add_state(app: FastAPI, service: _Service) -> None:
    judge, settings = service.judge, service.settings
    parameters = sum(p.numel() for p in judge.model.parameters())
    fixed = {
        "version": version("airl-fast"),
        "run": service.run,
        "task": judge.task.name,
        "policy": judge.policy.model.config.model_type,
        "discriminator": f"{judge.model.backbone.config.model_type}, head {judge.model.config.head}",
        "parameters": parameters,
        "dtype": judge.config.model.dtype,
        "device": str(judge.bridge.device),
        "ops": ops_backend(judge.bridge.device),
        "scorer": judge.config.evaluate.scorer,
        "rule": judge.config.evaluate.localise,
        "threshold": service.thresholds.get("reward"),
        "batch_tokens": settings.batch_tokens,
        "max_traces": settings.limits.traces,
    }

    @app.get("/health", response_model=HealthOut, summary="What is served, and how busy it is")
    async def health() -> Response:
        alive = service.batcher.alive
        report = HealthOut(
            status="ok" if alive else "failed",
            queue_length=service.batcher.waiting,
            in_flight=service.guard.in_flight,
            uptime_s=round(time.monotonic() - service.began, 3),
            **fixed,
        )
        return Response(_bytes(report), 200 if alive else 503, media_type="application/json")

    @app.get("/metrics", response_class=Response, summary="Counts in Prometheus' text format")
    async def metrics() -> Response:
        text = service.metrics.text(
            waiting=service.batcher.waiting,
            in_flight=service.guard.in_flight,
            uptime=time.monotonic() - service.began,
        )
        return Response(text, media_type=CONTENT_TYPE)


def trace_rows(traces: Sequence[TraceIn]) -> list[TraceRow]:
    """As a line of a trace file is read; ServiceError names the trace that is not one."""
    rows = []
    for i, trace in enumerate(traces):
        place = f"traces.{i}"
        try:
            row, _ = parse_trace(Path(place), 0, trace.model_dump(exclude_none=True, exclude={"id"}))
        except UserError as error:
            raise ServiceError(422, "invalid_request", str(error).removeprefix(f"{place}:0: "), place) from None
        if trace.final_answer is not None and trace.completion is not None:
            message = "'final_answer' goes with 'steps'; a completion holds its own answer."
            raise ServiceError(422, "invalid_request", message, place)
        rows.append(replace(row, id=place if trace.id is None else str(trace.id), place=place))
    return rows


def _bytes(model: BaseModel) -> bytes:
    return model.model_dump_json().encode()

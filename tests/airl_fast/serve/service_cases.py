"""The service of the small run, in process, with whatever limits a test wants."""

import functools
import time
from dataclasses import dataclass, fields, replace

from fastapi import FastAPI

from airl_fast.config import BuildConfig
from airl_fast.judge.judge import Judge, open_judge
from airl_fast.judge.locate import Thresholds
from airl_fast.models.build import build_model, build_tokenizer
from airl_fast.models.load import wrap
from airl_fast.serve.app import Settings, make_app
from airl_fast.serve.guard import Limits
from airl_fast.serve.server import thresholds_of
from airl_fast.types import Example
from tests.airl_fast.run_cases import small_run

LIMITS = Limits(body=2**20, traces=32, concurrency=16, timeout=30.0)
SETTINGS = Settings(limits=LIMITS, token=None, batch_tokens=16384, batch_wait=0.0)


@functools.cache
def judge() -> Judge:
    return open_judge(small_run())


@functools.cache
def other_judge() -> Judge:
    """The same reward, reading an untrained policy with a tokenizer of its own."""
    build = BuildConfig(vocab_size=300, hidden_size=32, layers=1)
    texts = [text for each in demonstrations() for text in (each.prompt, each.expert)]
    tokenizer = build_tokenizer(texts, build)
    return open_judge(small_run(), policy=wrap(build_model(build, tokenizer, 0), tokenizer))


@functools.cache
def thresholds() -> Thresholds:
    return thresholds_of(judge())


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowJudge(Judge):
    """Takes so many seconds more for every pass."""

    seconds: float

    def score(self, traces, examples, step_ends=None):
        time.sleep(self.seconds)
        return Judge.score(self, traces, examples, step_ends)


def app_with(*, slow: float = 0.0, token: str | None = None, **limits: float) -> FastAPI:
    """slow: seconds that every pass takes beyond its own."""
    settings = replace(SETTINGS, token=token, limits=replace(LIMITS, **limits))
    own = {each.name: getattr(judge(), each.name) for each in fields(Judge)}
    return make_app(SlowJudge(**own, seconds=slow), thresholds(), "small", settings)


@functools.cache
def demonstrations() -> tuple[Example, ...]:
    return tuple(judge().task.load("test", 8))


def rows(count: int, start: int = 0) -> list[dict]:
    return [
        {"id": each.id, "prompt": each.prompt, "completion": each.expert}
        for each in demonstrations()[start : start + count]
    ]

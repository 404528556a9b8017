"""Requests share passes, and none can tell."""

import json
from concurrent.futures import Future

import numpy as np
import pytest

from airl_fast.data.trace_rows import TraceRow
from airl_fast.judge.judge import Judge
from airl_fast.serve.answers import score_answer
from airl_fast.serve.batching import Batcher
from airl_fast.serve.errors import ServiceError
from tests.airl_fast.serve.service_cases import demonstrations, judge, other_judge

WAIT = 0.5


def requests() -> list[list[TraceRow]]:
    """Of one to three traces; the first two ask about the same prompt, which a pass computes once."""
    found = []
    for i, example in enumerate(demonstrations()):
        texts = [example.expert, "<think>\n1 + 1 = 3\n</think>\n<answer>3</answer>", "no tags, no answer"]
        prompt = demonstrations()[max(i, 1)].prompt
        found.append([TraceRow(id=f"{i}", place="", prompt=prompt, text=text) for text in texts[: i % 3 + 1]])
    return found


def tokens_of(rows: list[TraceRow]) -> int:
    chat = judge().maker.chat
    return sum(len(chat.prompt_tokens(row.prompt)) + len(chat.completion_tokens(row.text)) for row in rows)


def batcher_of(by: Judge, budget: int, wait: float, passes: list, in_progress: int = 99) -> Batcher:
    return Batcher(by, tokens=budget, wait=wait, in_progress=lambda: in_progress, observe=passes.append)


def serve(batches: list[list[TraceRow]], budget: int, wait: float, by: Judge | None = None):
    """Futures of all requests, submitted at once, and the passes that answered them."""
    passes = []
    batcher = batcher_of(by or judge(), budget, wait, passes)
    futures = [
        batcher.submit(rows, lambda s, e: score_answer(judge(), s, e).model_dump_json().encode()) for rows in batches
    ]
    batcher.close()
    assert not batcher.alive
    return futures, passes


def numbers(future: Future) -> list[dict]:
    return json.loads(future.result(0))["traces"]


def test_a_result_does_not_depend_on_its_company():
    asked = requests()
    together, passes = serve(asked, 10**6, WAIT)
    assert [each.requests for each in passes] == [len(asked)]
    assert passes[0].traces == sum(map(len, asked))
    assert passes[0].tokens == sum(map(tokens_of, asked))
    alone, passes = serve(asked, 1, WAIT)
    assert [each.requests for each in passes] == [1] * len(asked)
    for one, other in zip(together, alone, strict=True):
        for left, right in zip(numbers(one), numbers(other), strict=True):
            np.testing.assert_allclose(left["token_rewards"], right["token_rewards"], rtol=0, atol=1e-5)
            assert left["tokens"] == right["tokens"]
            assert [s["text"] for s in left["steps"]] == [s["text"] for s in right["steps"]]


def test_company_does_not_matter_to_a_policy_with_another_tokenizer():
    """Then the prompts are read again from the examples, which must be those of the request."""
    asked = requests()
    judge_ = other_judge()
    assert judge_.bridge.chat is not None
    results = []
    for budget in (10**6, 1):
        passes = []
        batcher = batcher_of(judge_, budget, WAIT, passes)
        futures = [batcher.submit(rows, lambda s, e: s.reward.values.tobytes()) for rows in asked]
        batcher.close()
        assert [each.requests for each in passes] == ([len(asked)] if budget > 1 else [1] * len(asked))
        results.append([np.frombuffer(future.result(0)) for future in futures])
    for together, alone in zip(*results, strict=True):
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
        assert np.ptp(alone) > 1e-3


def test_passes_keep_to_the_budget():
    asked = [rows[:1] for rows in requests()[:5]]
    sizes = [tokens_of(rows) for rows in asked]
    futures, passes = serve(asked, max(sizes[0] + sizes[1], sizes[2] + sizes[3]), WAIT)
    assert all(each.tokens <= max(sizes[0] + sizes[1], sizes[2] + sizes[3]) for each in passes)
    assert sum(each.requests for each in passes) == 5
    assert len(passes) == 3
    assert [numbers(future)[0]["id"] for future in futures] == [rows[0].id for rows in asked]


def test_nobody_waits_for_requests_that_are_not_there():
    passes, asked = [], requests()
    batcher = batcher_of(judge(), 10**6, 60.0, passes, in_progress=1)
    for rows in asked[:3]:
        assert batcher.submit(rows, lambda s, e: b"done").result(30) == b"done"
    batcher.close()
    assert [each.requests for each in passes] == [1, 1, 1]


def test_a_request_given_up_costs_no_pass():
    passes = []
    batcher = batcher_of(judge(), 1, 0.0, passes)
    futures = [batcher.submit(rows, lambda s, e: b"done") for rows in requests()]
    cancelled = [future.cancel() for future in futures]
    batcher.close()
    assert any(cancelled)
    assert len(passes) == len(futures) - sum(cancelled)
    assert all(future.result(0) == b"done" for future, gone in zip(futures, cancelled, strict=True) if not gone)


class Fragile(Judge):
    """Fails as a whole when one of its traces says so."""

    def score(self, traces, examples, step_ends=None):
        if any("no tags" in trace.text for trace in traces):
            raise RuntimeError("a failure in the middle of a pass")
        return super().score(traces, examples, step_ends)


def test_a_request_that_breaks_a_pass_breaks_alone(caplog):
    fragile = Fragile(config=judge().config, model=judge().model, bridge=judge().bridge, policy=judge().policy)
    asked = requests()
    futures, passes = serve(asked, 10**6, WAIT, fragile)
    broken = [any("no tags" in row.text for row in rows) for rows in asked]
    assert broken.count(True) == 2
    for future, is_broken, rows in zip(futures, broken, asked, strict=True):
        if is_broken:
            with pytest.raises(RuntimeError, match="in the middle"):
                future.result(0)
        else:
            assert len(numbers(future)) == len(rows)
    assert [each.requests for each in passes] == [1] * broken.count(False)
    assert "each is run alone" in caplog.text


def test_a_request_that_cannot_be_read_leaves_the_others_alone():
    asked = requests()[:3]
    asked[1] = [TraceRow(id="long", place="traces.0", prompt=asked[0][0].prompt, text="1 " * 400)]
    futures, passes = serve(asked, 10**6, WAIT)
    with pytest.raises(ServiceError, match="long has .* tokens, the policy's context") as caught:
        futures[1].result(0)
    assert (caught.value.status, caught.value.where) == (422, "traces.0")
    assert [len(numbers(futures[i])) for i in (0, 2)] == [1, 3]
    assert [each.requests for each in passes] == [2]

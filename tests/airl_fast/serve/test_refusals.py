"""What the service refuses, and that every refusal has the one shape."""

import asyncio
import logging

import httpx
import pytest
from fastapi.testclient import TestClient

from airl_fast.serve.app import make_app
from tests.airl_fast.serve.service_cases import SETTINGS, app_with, judge, rows

PROMPT = "start 1; gain 1?"


@pytest.fixture(scope="module")
def client():
    with TestClient(app_with()) as client:
        yield client


def error_of(response, status, code):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message", "where"}
    assert body["error"]["code"] == code
    assert "Traceback" not in response.text
    return body["error"]


@pytest.mark.parametrize(
    ("trace", "where", "words"),
    [
        ({"completion": "1"}, "traces.1.prompt", "field required"),
        ({"prompt": PROMPT}, "traces.1", "either 'completion' or 'steps'"),
        ({"prompt": PROMPT, "completion": "1", "steps": ["1"]}, "traces.1", "either 'completion' or 'steps'"),
        ({"prompt": PROMPT, "completion": "1", "final_answer": "1"}, "traces.1", "goes with 'steps'"),
        ({"prompt": PROMPT, "completion": "1", "answer": "2"}, "traces.1.answer", "is a label"),
        ({"prompt": PROMPT, "completion": "1", "first_wrong_step": 0}, "traces.1.first_wrong_step", "is a label"),
        ({"prompt": PROMPT, "completion": "1", "colour": "red"}, "traces.1.colour", "no field 'colour'"),
        ({"prompt": " ", "completion": "1"}, "traces.1", "'prompt' is empty"),
        ({"prompt": PROMPT, "steps": [" "]}, "traces.1", "'steps' must be"),
        ({"prompt": PROMPT, "steps": ["a", 3]}, "traces.1.steps.1", "valid string"),
        ({"prompt": PROMPT, "completion": "1", "id": True}, "traces.1.id", "string or a finite number"),
        ({"prompt": PROMPT, "completion": "1 + 1 = 2\n" * 99}, "traces.1", "context"),
    ],
)
def test_a_bad_trace_is_named(client, trace, where, words):
    good = {"prompt": PROMPT, "completion": "1 + 1 = 2"}
    code = "too_long" if words == "context" else "invalid_request"
    error = error_of(client.post("/score", json={"traces": [good, trace, good]}), 422, code)
    assert error["where"] == where
    assert words in error["message"]


def test_a_long_candidate_is_named(client):
    prompts = [{"prompt": PROMPT, "completions": ["1", "1"]}, {"prompt": PROMPT, "completions": ["1", "2 " * 300]}]
    error = error_of(client.post("/rerank", json={"prompts": prompts}), 422, "too_long")
    assert error["where"] == "prompts.1.completions.1"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "invalid_request"),
        (b"{", 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"traces": ' + b"9" * 10_000 + b"}", 400, "invalid_json"),
        (b"\xff\x00\x80", 400, "invalid_json"),
        (b"[]", 422, "invalid_request"),
        (b'{"traces": []}', 422, "invalid_request"),
        (b'{"traces": [{"prompt": "a", "completion": "\\ud800"}]}', 422, "invalid_request"),
        (b'{"traces": [{"prompt": "a", "steps": ["b"], "final_answer": NaN}]}', 422, "invalid_request"),
    ],
)
def test_a_body_that_is_no_request(client, body, status, code):
    error_of(client.post("/score", content=body, headers={"Content-Type": "application/json"}), status, code)


def test_other_media_paths_and_methods(client):
    error_of(client.post("/score", data={"traces": "x"}), 415, "unsupported_media_type")
    assert error_of(client.get("/nowhere"), 404, "not_found")["where"] == "/nowhere"
    response = client.get("/score")
    error_of(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_too_many_traces(client):
    assert (
        "33 traces" in error_of(client.post("/score", json={"traces": rows(1) * 33}), 422, "too_many_traces")["message"]
    )
    prompts = [{"prompt": PROMPT, "completions": ["1"] * 17}] * 2
    error_of(client.post("/rerank", json={"prompts": prompts}), 422, "too_many_traces")


def test_the_body_limit_with_and_without_its_length():
    with TestClient(app_with(body=1000)) as client:
        request = {"traces": [{"prompt": PROMPT, "completion": "1" * 1000}]}
        error_of(client.post("/score", json=request), 413, "body_too_large")
        chunks = (b" " * 100 for _ in range(20))  # httpx sends a generator chunked, without Content-Length
        headers = {"Content-Type": "application/json"}
        error_of(client.post("/score", content=chunks, headers=headers), 413, "body_too_large")
        request = {"traces": [{"prompt": PROMPT, "completion": "1 + 1 = 2"}]}
        assert client.post("/score", json=request).status_code == 200


def test_the_token():
    with TestClient(app_with(token="a-secret")) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "a-secret"}, {"Authorization": "Bearer a-secre"}):
            response = client.post("/score", json={"traces": rows(1)}, headers=headers)
            error_of(response, 401, "unauthorised")
            assert response.headers["www-authenticate"] == "Bearer"
        error_of(client.get("/metrics"), 401, "unauthorised")
        headers = {"Authorization": "Bearer a-secret"}
        assert client.post("/score", json={"traces": rows(1)}, headers=headers).status_code == 200


def test_more_requests_than_may_be_in_progress():
    async def both():
        app = app_with(slow=0.3, concurrency=1)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):
            first = asyncio.create_task(client.post("/score", json={"traces": rows(1)}))
            await asyncio.sleep(0.1)
            second = await client.post("/score", json={"traces": rows(1)})
            health = await client.get("/health")
            return await first, second, health, await client.post("/score", json={"traces": rows(1)})

    first, second, health, third = asyncio.run(both())
    assert first.status_code == third.status_code == 200
    error_of(second, 503, "overloaded")
    assert second.headers["retry-after"] == "1"
    assert health.json()["in_flight"] == 1


def test_an_answer_that_takes_too_long():
    with TestClient(app_with(slow=0.6, timeout=0.1)) as client:
        error_of(client.post("/score", json={"traces": rows(1)}), 504, "timeout")


def test_a_body_that_does_not_arrive():
    async def stalled():
        await asyncio.sleep(5)
        yield b"{}"

    async def post():
        app = app_with(timeout=0.1)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://x") as client,
        ):
            return await client.post("/score", content=stalled())

    error_of(asyncio.run(post()), 408, "body_timeout")


def test_an_unexpected_error_is_logged_and_not_shown(caplog):
    app = app_with()

    @app.get("/broken")
    def broken():
        raise RuntimeError("a detail of the inside")

    with TestClient(app, raise_server_exceptions=False) as client, caplog.at_level(logging.ERROR):
        response = client.get("/broken")
    error_of(response, 500, "internal")
    assert "inside" not in response.text
    assert "a detail of the inside" in caplog.text


def test_localize_without_a_threshold():
    with TestClient(make_app(judge(), {}, "small", SETTINGS)) as client:
        error = error_of(client.post("/localize", json={"traces": rows(1)}), 409, "not_calibrated")
        assert "largest_drop" in error["message"]
        assert client.post("/localize", json={"traces": rows(1), "rule": "largest_drop"}).status_code == 200

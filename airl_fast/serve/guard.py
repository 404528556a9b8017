"""What a request meets before any of it is parsed: the token, the number of requests, the size of the body."""

import asyncio
import hmac
import time
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from airl_fast.serve.errors import ServiceError
from airl_fast.serve.metrics import Metrics

PATHS = ("/score", "/rerank", "/localize", "/health", "/metrics", "/openapi.json")
OPEN_PATH = "/health"  # needs no token: whoever watches the service need not be able to use it
CLIENT_LEFT = 499  # nginx's status for it; nobody receives it, the metrics count it


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """body: bytes of one request. traces: of one request. concurrency: requests being read, waiting or computed.
    timeout: seconds for the body to arrive, and again for the answer."""

    body: int
    traces: int
    concurrency: int
    timeout: float


class ClientLeft(Exception):
    """The client has closed its connection."""


class Guard:
    """ASGI middleware. in_flight: POST requests it has let in and whose response is not sent."""

    def __init__(self, app: ASGIApp, limits: Limits, token: str | None, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._credentials = None if token is None else f"Bearer {token}".encode()
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, path, status = time.monotonic(), scope["path"], 500

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._admit(scope, receive, counted)
        except ServiceError as error:
            await error.response()(scope, receive, counted)
        except ClientLeft:
            status = CLIENT_LEFT
        finally:
            self._metrics.answered(path if path in PATHS else "other", status, time.monotonic() - began)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._check_token(scope)
        if scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self.in_flight >= self._limits.concurrency:
            message = f"{self.in_flight} requests are in progress, as many as --concurrency allows; try again."
            raise ServiceError(503, "overloaded", message, headers={"Retry-After": "1", "Connection": "close"})
        self.in_flight += 1
        try:
            body = await self._body(scope, receive)
            await self._answer(scope, body, receive, send)
        finally:
            self.in_flight -= 1

    def _check_token(self, scope: Scope) -> None:
        if self._credentials is None or scope["path"] == OPEN_PATH:
            return
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or not hmac.compare_digest(given[0], self._credentials):
            message = "send the service's token in the header Authorization: Bearer TOKEN."
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            raise ServiceError(401, "unauthorised", message, headers=headers)

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let the application answer. A client that leaves before the response begins cancels its request, which
        costs no pass then unless one has begun with it."""
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        work = asyncio.ensure_future(self._app(scope, _replay(body), watched))
        left = asyncio.ensure_future(receive())  # after the body: comes when the client leaves, or has its response
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and not begun:
                raise ClientLeft
            await work
        finally:
            left.cancel()
            work.cancel()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, counted as it arrives, since a chunked one does not say how long it is. The connection is
        closed after a refusal: the rest of the body is not read."""
        limit = self._limits.body
        size = f"the body is larger than {limit / 2**20:g} MiB (--max-body-mib); send fewer traces at a time."
        too_large = ServiceError(413, "body_too_large", size, headers={"Connection": "close"})
        declared = [value for name, value in scope["headers"] if name == b"content-length"]
        if declared and int(declared[0]) > limit:
            raise too_large
        chunks, length = [], 0
        try:
            async with asyncio.timeout(self._limits.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    chunks.append(message.get("body", b""))
                    length += len(chunks[-1])
                    if length > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            message = f"the body did not arrive within {self._limits.timeout:g} s (--timeout)."
            raise ServiceError(408, "body_timeout", message, headers={"Connection": "close"}) from None


def _replay(body: bytes) -> Receive:
    """Give the application the body that was read. It is told of no disconnection: it is cancelled."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            await asyncio.get_running_loop().create_future()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again

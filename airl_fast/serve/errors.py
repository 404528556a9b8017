"""Every refusal has one shape, {"error": {"code", "message", "where"}}, and never a traceback."""

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from airl_fast.serve.schema import LABELS

log = logging.getLogger(__name__)

_ALTERNATIVES = ("str", "int", "float", "constrained-str")


class ErrorBody(BaseModel):
    code: str = Field(description="a word to branch on", examples=["too_long"])
    message: str = Field(description="one sentence for people")
    where: str | None = Field(description="the part of the request at fault", examples=["traces.3"])


class ErrorOut(BaseModel):
    """What every answer that is not 200 holds."""

    error: ErrorBody


class ServiceError(Exception):
    """A request that is not answered. status: of the response. headers: more of it."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        where: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.where = status, code, message, where
        self.headers = dict(headers or {})

    def response(self) -> Response:
        body = ErrorOut(error=ErrorBody(code=self.code, message=self.message, where=self.where))
        return Response(body.model_dump_json(), self.status, self.headers, "application/json")


def handle_errors(app: FastAPI) -> None:
    """Give every error that can reach a client the one shape."""

    async def refused(request: Request, error: ServiceError) -> Response:
        return error.response()

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return invalid_request(error.errors(), request.headers.get("content-type", "")).response()

    async def http(request: Request, error: HTTPException) -> Response:
        return http_error(error, request).response()

    async def unexpected(request: Request, error: Exception) -> Response:
        log.error("%s %r failed", request.method, request.url.path, exc_info=error)
        message = "the service failed on this request; its log says why."
        return ServiceError(500, "internal", message).response()

    app.add_exception_handler(ServiceError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unexpected)


def invalid_request(problems: Sequence[Mapping], content_type: str) -> ServiceError:
    """The first of pydantic's findings as one sentence; the values sent are not repeated."""
    kind, place = problems[0]["type"], _place(problems[0])
    if kind == "json_invalid":
        reason = problems[0].get("ctx", {}).get("error", "syntax")
        return ServiceError(400, "invalid_json", f"the body is not JSON ({reason}, character {place[0]}).")
    if not place and "json" not in content_type:
        message = "send the request as JSON with the header Content-Type: application/json."
        return ServiceError(415, "unsupported_media_type", message)
    alternatives = [problem for problem in problems if _place(problem) == place]
    if kind == "extra_forbidden" and place[-1] in LABELS:
        message = f"{place[-1]!r} is a label or a note; a scorer must not see it, so leave it out"
    elif kind == "extra_forbidden":
        message = f"there is no field {place[-1]!r}; GET /openapi.json lists the fields"
    elif len(alternatives) > 1:
        message = f"{place[-1]!r} must be a string or a finite number"
    else:
        message = problems[0]["msg"][:1].lower() + problems[0]["msg"][1:]
    more = len({_place(problem) for problem in problems}) - 1
    message += f"; {more} more of the request's fields are wrong." if more else "."
    return ServiceError(422, "invalid_request", message, ".".join(place) or None)


def _place(problem: Mapping) -> tuple[str, ...]:
    """Where in the body. Of alternative types pydantic names the one it tried, which is no part of the body."""
    place = [str(part) for part in problem["loc"] if part != "body"]
    tried = place and problem["type"] not in ("missing", "extra_forbidden") and place[-1] in _ALTERNATIVES
    return tuple(place[:-1] if tried else place)


def http_error(error: HTTPException, request: Request) -> ServiceError:
    """What Starlette and FastAPI raise by themselves: no such path, no such method, a body that cannot be parsed."""
    path = request.url.path
    if error.status_code == 404:
        return ServiceError(404, "not_found", "there is no such path; GET /openapi.json lists them.", path)
    if error.status_code == 405:
        message = f"{path} does not take {request.method}; the header Allow says what it takes."
        return ServiceError(405, "method_not_allowed", message, path, error.headers)
    if error.status_code == 400:
        return ServiceError(400, "invalid_json", "the body is not JSON that can be read; check numbers and nesting.")
    name = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
    return ServiceError(error.status_code, name, str(error.detail), None, error.headers)


def error_schemas(*statuses: int) -> dict[int | str, dict]:
    """For a path's OpenAPI entry."""
    return {status: {"model": ErrorOut, "description": HTTPStatus(status).phrase} for status in statuses}

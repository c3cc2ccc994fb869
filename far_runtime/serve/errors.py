"""Errors of the API, in OpenAI's form."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from far_runtime.errors import FarError
from far_runtime.serve.batching import LOG, Closed, Failed, OutOfRange, QueueFull
from far_runtime.serve.metrics import Metrics
from far_runtime.serve.schema import ErrorBody


class Late(FarError):
    """A picture was not there in time."""


class Unknown(FarError):
    """No such model."""


STATUS: dict[type[FarError], tuple[int, str, str]] = {
    QueueFull: (429, "rate_limit_error", "queue_full"),
    Closed: (503, "server_error", "closing"),
    OutOfRange: (500, "server_error", "out_of_range"),
    Failed: (500, "server_error", "internal_error"),
    Late: (504, "server_error", "deadline"),
    Unknown: (404, "invalid_request_error", "model_not_found"),
    FarError: (400, "invalid_request_error", "invalid_value"),
}
"""Status, type and code of an error; a kind that is not named has its parent's."""

SAID: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request cannot be: what is wrong, and what is expected"},
    401: {"model": ErrorBody, "description": "No key, or an unknown one"},
    403: {"model": ErrorBody, "description": "Asked by a page of another site"},
    404: {"model": ErrorBody, "description": "No such model"},
    408: {"model": ErrorBody, "description": "The body came too slowly"},
    421: {"model": ErrorBody, "description": "Called by a name that is not the server's"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    429: {"model": ErrorBody, "description": "Too many pictures wait, or were drawn for this key: see Retry-After"},
    500: {"model": ErrorBody, "description": "A fault of the server"},
    503: {"model": ErrorBody, "description": "The server is shutting down"},
    504: {"model": ErrorBody, "description": "Not drawn within the deadline"},
}


def only(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Some of the errors that are SAID."""
    return {status: SAID[status] for status in statuses}


def error_of(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of an error."""
    headers: dict[str, str] = {}
    if isinstance(error, FarError):
        status, kind, code = next(STATUS[each] for each in type(error).__mro__ if each in STATUS)
        message = str(error)
        if isinstance(error, QueueFull):
            headers = {"Retry-After": str(math.ceil(error.wait))}
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        code = {401: "invalid_api_key", 429: "rate_limit"}.get(status, "http_error")
    else:
        status, kind, code = 500, "server_error", "internal_error"
        message = str(Failed())
    return status, {"error": {"message": message, "type": kind, "param": None, "code": code}}, headers


def note(error: Exception, metrics: Metrics) -> None:
    """Count a refusal, and log a fault of the server."""
    if isinstance(error, QueueFull):
        metrics.rejections.labels("queue").inc()
    elif isinstance(error, Late):
        metrics.rejections.labels("deadline").inc()
    elif error_of(error)[0] == 500 and not isinstance(error, Failed):  # which is in the log
        LOG.error("request failed", exc_info=error)


def handle_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error in OpenAI's form."""

    async def known(request: Request, error: Exception) -> JSONResponse:
        note(error, metrics)
        status, body, headers = error_of(error)
        return JSONResponse(body, status, headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        place = first["loc"][1] if len(first["loc"]) > 1 else None  # a number: where in the text it is no JSON
        field = place if isinstance(place, str) else None
        message = f"{field or 'the body'}: {first['msg']}"
        detail = {"message": message, "type": "invalid_request_error", "param": field, "code": "invalid_value"}
        return JSONResponse({"error": detail}, 400)

    app.add_exception_handler(FarError, known)
    app.add_exception_handler(HTTPException, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Exception, known)

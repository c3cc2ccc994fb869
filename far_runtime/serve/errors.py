"""Error responses of the API, in OpenAI's form."""

from __future__ import annotations

import math
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from far_runtime.errors import FarError
from far_runtime.serve.batching import LOG
from far_runtime.serve.exceptions import (
    DeadlineExceeded,
    GenerationFailed,
    ModelNotFound,
    OutOfRange,
    QueueFull,
    ShuttingDown,
)
from far_runtime.serve.metrics import Metrics
from far_runtime.serve.schema import ErrorBody

ERROR_CODES: dict[type[FarError], tuple[int, str, str]] = {
    QueueFull: (429, "rate_limit_error", "queue_full"),
    ShuttingDown: (503, "server_error", "closing"),
    OutOfRange: (500, "server_error", "out_of_range"),
    GenerationFailed: (500, "server_error", "internal_error"),
    DeadlineExceeded: (504, "server_error", "deadline"),
    ModelNotFound: (404, "invalid_request_error", "model_not_found"),
    FarError: (400, "invalid_request_error", "invalid_value"),
}
"""Status, type and code of an exception; a class that is not listed has its parent's."""

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request is invalid; the message says what is expected"},
    401: {"model": ErrorBody, "description": "The API key is missing or unknown"},
    403: {"model": ErrorBody, "description": "The request comes from a page of another site"},
    404: {"model": ErrorBody, "description": "The server has no such model"},
    408: {"model": ErrorBody, "description": "The body came too slowly"},
    421: {"model": ErrorBody, "description": "The Host header is not a name of this server"},
    413: {"model": ErrorBody, "description": "The body is too large"},
    429: {"model": ErrorBody, "description": "The queue is full or the key's rate is used up; see Retry-After"},
    500: {"model": ErrorBody, "description": "The server failed"},
    503: {"model": ErrorBody, "description": "The server is shutting down"},
    504: {"model": ErrorBody, "description": "The pictures were not drawn within the deadline"},
}
"""The error responses of every route that draws, as the OpenAPI document has them."""


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The ones of ERROR_RESPONSES that a route may send."""
    return {status: ERROR_RESPONSES[status] for status in statuses}


def error_response(error: Exception) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Status, body and headers of the response to an exception."""
    headers: dict[str, str] = {}
    if isinstance(error, FarError):
        status, error_type, code = next(ERROR_CODES[parent] for parent in type(error).__mro__ if parent in ERROR_CODES)
        message = str(error)
        if isinstance(error, QueueFull):
            headers = {"Retry-After": str(math.ceil(error.retry_after))}
    elif isinstance(error, HTTPException):
        status, message, headers = error.status_code, str(error.detail), dict(error.headers or {})
        error_type = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        code = {401: "invalid_api_key", 429: "rate_limit"}.get(status, "http_error")
    else:
        status, error_type, code = 500, "server_error", "internal_error"
        message = str(GenerationFailed())
    return status, {"error": {"message": message, "type": error_type, "param": None, "code": code}}, headers


def record_error(error: Exception, metrics: Metrics) -> None:
    """Count a rejected request, and log a failure of the server."""
    if isinstance(error, QueueFull):
        metrics.rejections.labels("queue").inc()
    elif isinstance(error, DeadlineExceeded):
        metrics.rejections.labels("deadline").inc()
    elif error_response(error)[0] == 500 and not isinstance(error, GenerationFailed):  # those the batcher has logged
        LOG.error("request failed", exc_info=error)


def add_exception_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Let the application answer every exception in OpenAI's form."""

    async def exception_handler(request: Request, error: Exception) -> JSONResponse:
        record_error(error, metrics)
        status, body, headers = error_response(error)
        return JSONResponse(body, status, headers)

    async def validation_exception_handler(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        # For a body that is not JSON, the location is a position in the text.
        location = first["loc"][1] if len(first["loc"]) > 1 else None
        field = location if isinstance(location, str) else None
        message = f"{field or 'the body'}: {first['msg']}"
        detail = {"message": message, "type": "invalid_request_error", "param": field, "code": "invalid_value"}
        return JSONResponse({"error": detail}, 400)

    app.add_exception_handler(FarError, exception_handler)
    app.add_exception_handler(HTTPException, exception_handler)
    app.add_exception_handler(RequestValidationError, validation_exception_handler)
    app.add_exception_handler(Exception, exception_handler)

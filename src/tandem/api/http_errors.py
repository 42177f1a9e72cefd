"""Errors in OpenAI's shape, and those that only HTTP knows: branches of the tree in `tandem.errors`.

RequestError
├── InvalidRequest
│   ├── UnknownField        400: no such field
│   ├── UnsupportedField    400: the field exists at OpenAI or vLLM, and this value of it is not served here
│   └── ContextTooLong      400: prompt and output do not fit into the model
├── Unauthorized            401
├── Forbidden               403: without API keys, only whoever is on this machine runs the engines
├── NotFound                404
│   └── ModelNotFound       404: another model than the one served
├── MethodNotAllowed        405
├── TooSlow                 408: headers or a body that did not come in time
├── BodyTooLarge            413
├── TooManyRequests         429: this client has too many open requests
└── HeadTooLarge            431: the request's line and headers
"""

from __future__ import annotations

import http
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.responses import Response

from tandem.errors import InvalidRequest, RequestError

RETRY_AFTER_S = 1
MAX_NAME = 80
MAX_MESSAGE = 1000
UNREAD = frozenset({408, 413, 431})
"""Statuses after which the connection is closed, as the rest of the request is not read."""


class UnknownField(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedField(InvalidRequest):
    code = "unsupported_parameter"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(RequestError):
    status = 401
    code = "invalid_api_key"


class Forbidden(RequestError):
    status = 403
    code = "forbidden"


class NotFound(RequestError):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class TooSlow(RequestError):
    status = 408
    code = "request_timeout"


class BodyTooLarge(RequestError):
    status = 413
    code = "request_too_large"


class TooManyRequests(RequestError):
    status = 429
    code = "rate_limit_exceeded"


class HeadTooLarge(RequestError):
    status = 431
    code = "headers_too_large"


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


def error_body(error: RequestError) -> dict[str, Any]:
    """Return `{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read it.

    What is at fault is quoted, and may be the whole of a large body; so all of it is clipped here.
    """
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    param = None if error.param is None else clipped(error.param)
    return {"error": {"message": clipped(str(error), MAX_MESSAGE), "type": kind, "param": param, "code": error.code}}


def clipped(text: str, most: int = MAX_NAME) -> str:
    """Return what a client sent, as it is shown in an error: no longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def error_response(error: RequestError, shape: Callable[[RequestError], dict[str, Any]] = error_body) -> Response:
    return json_response(shape(error), error.status, _headers(error))


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def raw_response(error: RequestError) -> bytes:
    """Return an error as HTTP/1.1 would write it, for what has not become a request; the connection ends with it."""
    response = error_response(error)
    response.headers["connection"] = "close"
    phrase = http.HTTPStatus(error.status).phrase.encode()
    lines = [b"HTTP/1.1 %d %s" % (error.status, phrase), *(b"%s: %s" % pair for pair in response.raw_headers)]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


def unexpected() -> RequestError:
    """Return what a client is told of our own bug; the log has the traceback."""
    return RequestError("the server failed on this request; its log says why")


def _headers(error: RequestError) -> dict[str, str]:
    if error.status in UNREAD:
        return {"Connection": "close"}
    if error.status in (429, 503):
        return {"Retry-After": str(RETRY_AFTER_S if error.retry_after is None else error.retry_after)}
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {}

"""Errors in OpenAI's shape, and those that only HTTP knows: branches of the tree in `tandem.errors`.

RequestError
├── InvalidRequest
│   ├── UnknownField        400: no such field
│   ├── UnsupportedField    400: the field exists at OpenAI or vLLM, and this value of it is not served here
│   └── ContextTooLong      400: prompt and output do not fit into the model
├── Unauthorized            401
├── NotFound                404
│   └── ModelNotFound       404: another model than the one served
├── MethodNotAllowed        405
└── BodyTooLarge            413
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from tandem.errors import InvalidRequest, RequestError
from tandem.wire.messages import clip

RETRY_AFTER_S = 1


class UnknownField(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedField(InvalidRequest):
    code = "unsupported_parameter"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(RequestError):
    status = 401
    code = "invalid_api_key"


class NotFound(RequestError):
    status = 404
    code = "not_found"


class ModelNotFound(NotFound):
    code = "model_not_found"


class MethodNotAllowed(RequestError):
    status = 405
    code = "method_not_allowed"


class BodyTooLarge(RequestError):
    status = 413
    code = "request_too_large"


class ClientGone(Exception):
    """The client closed its connection before its answer was complete."""


def error_body(error: RequestError) -> dict[str, Any]:
    """Return `{"error": {"message", "type", "param", "code"}}`, as OpenAI's clients read it.

    What is at fault is quoted, and may be the whole of a large body; so all of it is clipped here.
    """
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    param = None if error.param is None else clip(error.param)
    return {"error": {"message": clip(str(error)), "type": kind, "param": param, "code": error.code}}


def error_response(error: RequestError) -> Response:
    return json_response(error_body(error), error.status, _headers(error))


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, "application/json")


def unexpected() -> RequestError:
    """Return what a client is told of our own bug; the log has the traceback."""
    return RequestError("the server failed on this request; its log says why")


def _headers(error: RequestError) -> dict[str, str]:
    if error.status == 503:
        return {"Retry-After": str(RETRY_AFTER_S if error.retry_after is None else error.retry_after)}
    if error.status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {}

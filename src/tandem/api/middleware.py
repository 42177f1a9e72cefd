"""Give every request its id and, on /v1, check the API key."""

from __future__ import annotations

import hmac
import re
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem.api.http_errors import Unauthorized, error_response
from tandem.ids import new_request_id

REQUEST_ID = b"x-request-id"
_ALLOWED = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")


class ApiMiddleware:
    """Takes over or makes the request id, and lets in only those with the API key.

    A client's X-Request-Id is taken over if it has 1 to 128 letters, digits or `._:-`, else a fresh one is made; every
    response has it. With an API key, everything under /v1/ needs `Authorization: Bearer KEY`; /health, /metrics and
    /tandem/ are open.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._key = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID, b"")
        request_id = given if _ALLOWED.fullmatch(given) else new_request_id().encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (REQUEST_ID, request_id)]}
            await send(message)

        scope["tandem.request_id"] = request_id.decode()
        if scope["path"].startswith("/v1/") and not self._allowed(headers.get(b"authorization", b"")):
            refusal = Unauthorized("this server needs an API key: send `Authorization: Bearer KEY` with the right one")
            await error_response(refusal)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _allowed(self, authorization: bytes) -> bool:
        if self._key is None:
            return True
        scheme, _, key = authorization.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key)


def request_id_of(scope: Scope) -> str:
    """Return the id that the middleware has given to this request."""
    return cast(str, scope["tandem.request_id"])

"""Give every request its id and its client's name and, on /v1, check the API key."""

from __future__ import annotations

import re
from typing import cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem.api.api_keys import ApiKeys
from tandem.api.connections import client_of, is_local
from tandem.api.http_errors import Forbidden, Unauthorized, error_response
from tandem.ids import new_request_id

REQUEST_ID = b"x-request-id"
GUARDED = ("/v1/", "/tokenize", "/detokenize")
_ALLOWED = re.compile(rb"[A-Za-z0-9._:\-]{1,128}")


class ApiMiddleware:
    """Takes over or makes the request id, and lets in only those with the API key.

    A client's X-Request-Id is taken over if it has 1 to 128 letters, digits or `._:-`, else a fresh one is made; every
    response has it. With API keys, everything under /v1/, what works on text, and every POST under /tandem/, which runs
    an engine, needs `Authorization: Bearer KEY`; to read /health, /metrics and the like is open. Without keys, engines
    are run from this machine alone, and not by a web page that a browser on it shows.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys | None) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(REQUEST_ID, b"")
        request_id = given if _ALLOWED.fullmatch(given) else new_request_id().encode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (REQUEST_ID, request_id)]}
            await send(message)

        scope["tandem.request_id"] = request_id.decode()
        try:
            self._check(scope, headers)
        except (Unauthorized, Forbidden) as refusal:
            await error_response(refusal)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        """Name the client. Raises Unauthorized or Forbidden."""
        host = scope["client"][0] if scope.get("client") else ""
        client: str | None = client_of(host)
        runs_engine = scope["path"].startswith("/tandem/") and scope["method"] == "POST"
        if self._keys is not None and (scope["path"].startswith(GUARDED) or runs_engine):
            own = headers.get(b"x-api-key")  # as Anthropic's clients send it
            given = headers.get(b"authorization", b"" if own is None else b"Bearer " + own)
            scheme, _, key = given.partition(b" ")
            client = self._keys.client(key.strip()) if scheme.lower() == b"bearer" else None
            if client is None:
                raise Unauthorized("this server needs an API key: send `Authorization: Bearer KEY` with the right one")
        elif runs_engine and (not is_local(host) or b"origin" in headers):
            raise Forbidden(
                "this server has no API key, so its engines are run from its own machine alone, with `tandem drain` or"
                " the like: give it a key with TANDEM_API_KEY or --api-key-file"
            )
        scope["tandem.client"] = client


def client_name(scope: Scope) -> str:
    """Return the name of the client whose open requests are counted together: its key's, or its address."""
    return cast(str, scope["tandem.client"])


def request_id_of(scope: Scope) -> str:
    """Return the id that the middleware has given to this request."""
    return cast(str, scope["tandem.request_id"])

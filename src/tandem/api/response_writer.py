"""Send a response, or the events of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from tandem.api.http_errors import error_body, error_response, json_response
from tandem.api.openai import ResponseBody
from tandem.api.response_builder import encode
from tandem.errors import RequestError

HEADERS_AFTER_S = 0.25
COMMENT_EVERY_S = 5.0
DONE = b"data: [DONE]\n\n"
COMMENT = b": waiting\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True, slots=True)
class ErrorShape:
    """How an API writes errors. `event_prefix`: of the event that ends a stream."""

    body: Callable[[RequestError], dict[str, Any]]
    event_prefix: bytes = b""


OPENAIS = ErrorShape(error_body)


class ResponseWriter:
    """Sends a response, or the events of a stream, and knows whether the stream has begun.

    An error before that has its own HTTP status; after it, it is one event with the error object, and the stream ends
    without `[DONE]`.

    Args:
        errors: how they are written.
        comment_every: seconds without an event after which a stream has a comment.

    Attributes:
        answered: whether all was sent; what the client does then is its own affair.
    """

    def __init__(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        errors: ErrorShape = OPENAIS,
        comment_every: float = COMMENT_EVERY_S,
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self.answered = False
        self._comment_every = comment_every
        self._sending = asyncio.Lock()
        self._streaming = False
        self._sent_at = 0.0
        self._errors = errors

    async def event(self, content: ResponseBody | dict[str, Any], name: str | None = None) -> None:
        prefix = b"" if name is None else b"event: " + name.encode() + b"\n"
        await self._stream(prefix + b"data: " + encode(content) + b"\n\n")

    async def end(self, last: bytes) -> None:
        async with self._sending:
            self.answered = True
            await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def keep_alive(self) -> None:
        """Begin the stream, then send comments while there are no events; until cancelled.

        It begins after a moment, in which an engine with a full queue says so: this is a 503 then, which clients and
        their proxies understand better than an error in a stream.
        """
        await asyncio.sleep(HEADERS_AFTER_S)
        if not self._streaming:
            await self._stream(b"")
        now = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._comment_every - (now() - self._sent_at))
            if now() - self._sent_at >= self._comment_every:
                await self._stream(COMMENT)

    async def whole(self, content: msgspec.Struct | dict[str, Any]) -> None:
        response = json_response(content)
        self.answered = True
        await response(self._scope, self._receive, self._send)

    async def error(self, error: RequestError) -> None:
        if not self._streaming:
            await error_response(error, self._errors.body)(self._scope, self._receive, self._send)
            return
        await self._stream(self._errors.event_prefix + b"data: " + encode(self._errors.body(error)) + b"\n\n")
        await self.end(b"")

    async def _stream(self, content: bytes) -> None:
        async with self._sending:
            if not self._streaming:
                await self._send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                self._streaming = True
            if content:
                await self._send({"type": "http.response.body", "body": content, "more_body": True})
            self._sent_at = asyncio.get_running_loop().time()

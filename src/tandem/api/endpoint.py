"""One generating request over HTTP: body in, response or events out, the client watched throughout."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Literal

from starlette.types import Receive, Scope, Send

from tandem.api.backend import Backend
from tandem.api.generation import generate
from tandem.api.http_errors import (
    BodyTooLarge,
    ClientGone,
    ModelNotFound,
    error_body,
    error_response,
    json_response,
    unexpected,
)
from tandem.api.loaded_model import LoadedModel, ModelLoader
from tandem.api.metrics import Metrics, RequestMetrics
from tandem.api.middleware import request_id_of
from tandem.api.openai import Body, ResponseBody
from tandem.api.output_processor import TextChunk, joined
from tandem.api.parsing import parse
from tandem.api.prepared_request import PreparedRequest
from tandem.api.response_builder import ResponseBuilder, encode
from tandem.errors import InvalidRequest, RequestError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Kind = Literal["router", "engine"]


@dataclass(frozen=True, slots=True)
class Services:
    """Shared by all endpoints of an application; `create_app` explains them."""

    backend: Backend
    loader: ModelLoader
    metrics: Metrics
    kind: Kind
    max_body: int


@dataclass(frozen=True, slots=True)
class GenerateEndpoint(Generic[Body]):
    """An ASGI application that answers POST requests of one path.

    A stream's status line is sent with its first event, so an error before it has its own HTTP status. After it,
    an error is one event with the error object, and the stream ends without `[DONE]`.

    Args:
        name: of the endpoint, for logs and metrics.
        prepare: turns the body into sequences for the backend, by request id; raises RequestError.
    """

    name: str
    body_type: type[Body]
    prepare: Callable[[str, Body, LoadedModel], Coroutine[Any, Any, PreparedRequest]]
    builder_type: type[ResponseBuilder[Body]]
    services: Services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(scope)
        writer = ResponseWriter(scope, receive, send)
        with self.services.metrics.track(self.name) as metrics:
            try:
                body = await read_body(scope, receive, self.services.max_body)
                await unless_gone(receive, self._respond(request_id, body, writer, metrics))
                metrics.outcome = "ok"
            except ClientGone:
                metrics.outcome = "aborted"
            except RequestError as error:
                metrics.outcome = error.code
                await writer.error(error)
            except Exception:
                log.exception("request %s: %s failed", request_id, self.name)
                metrics.outcome = RequestError.code
                await writer.error(unexpected())
            finally:
                log.debug("request %s: %s ended: %s", request_id, self.name, metrics.outcome)

    async def _respond(self, request_id: str, raw: bytes, writer: ResponseWriter, metrics: RequestMetrics) -> None:
        body = parse(raw, self.body_type)
        model = await self.services.loader.get()
        if body.model is not None and body.model != model.card.name:
            raise ModelNotFound(f"there is no model {body.model!r} here; it is {model.card.name!r}", param="model")
        if body.kv_transfer_params is not None and self.services.kind == "router":
            raise InvalidRequest(
                "kv_transfer_params is for an engine's own API; a router chooses engines itself",
                param="kv_transfer_params",
            )
        request = await self.prepare(request_id, body, model)
        self.services.metrics.prompt_tokens.inc(request.prompt_tokens)
        self._log(request, body.user or "")
        builder = self.builder_type(request, body)
        async with aclosing(generate(self.services.backend, request, metrics)) as chunks:
            if body.stream:
                await _stream(chunks, builder, writer)
            else:
                await writer.whole(builder.whole(await _collect(chunks, len(request.sequences))))

    def _log(self, request: PreparedRequest, user: str) -> None:
        counts = f"{len(request.sequences)} sequences, {request.prompt_tokens} prompt tokens"
        by_user = f", user {user[:128]!r}" if user else ""
        log.info("request %s: %s, %s%s", request.request_id, self.name, counts, by_user)


class ResponseWriter:
    """Sends a response, or the events of a stream, and knows whether the stream has begun."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._streaming = False

    async def event(self, content: ResponseBody | dict[str, Any]) -> None:
        if not self._streaming:
            self._streaming = True
            await self._send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        body = b"data: " + encode(content) + b"\n\n"
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, last: bytes) -> None:
        await self._send({"type": "http.response.body", "body": last, "more_body": False})

    async def whole(self, content: ResponseBody) -> None:
        await json_response(content)(self._scope, self._receive, self._send)

    async def error(self, error: RequestError) -> None:
        if not self._streaming:
            await error_response(error)(self._scope, self._receive, self._send)
            return
        await self.event(error_body(error))
        await self.end(b"")


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """Return the whole body. Raises BodyTooLarge as soon as it is known to be, and ClientGone."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise BodyTooLarge(f"the body has {int(length)} bytes; at most {limit} are taken")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise BodyTooLarge(f"the body has more than the {limit} bytes that are taken")
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; cancel it and raise ClientGone when the client closes its connection first."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_client_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        working.result()
    finally:
        watching.cancel()
        working.cancel()
        await asyncio.gather(watching, working, return_exceptions=True)


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stream(
    chunks: AsyncGenerator[TextChunk, None], builder: ResponseBuilder[Any], writer: ResponseWriter
) -> None:
    async for chunk in chunks:
        await writer.event(builder.event(chunk))
    if builder.usage_at_end:
        await writer.event(builder.usage_event())
    await writer.end(DONE)


async def _collect(chunks: AsyncGenerator[TextChunk, None], choices: int) -> list[TextChunk]:
    parts: list[list[TextChunk]] = [[] for _ in range(choices)]
    async for chunk in chunks:
        parts[chunk.index].append(chunk)
    return [joined(one) for one in parts]

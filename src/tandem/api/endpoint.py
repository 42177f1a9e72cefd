"""The life of one generating request over HTTP: body in, answer or events out, the client watched all the while."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from starlette.types import Message, Receive, Scope, Send

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
from tandem.api.metrics import Metrics, Observation
from tandem.api.middleware import request_id_of
from tandem.api.openai import Answer, GenerateBody
from tandem.api.output import TextChunk, joined
from tandem.api.parsing import parse
from tandem.api.prepared_request import Caller, Kind, PreparedRequest
from tandem.api.response_builder import ResponseBuilder, encode
from tandem.errors import RequestError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Body = TypeVar("Body", bound=GenerateBody)


class GenerateEndpoint(Generic[Body]):
    """An ASGI application for one path.

    A stream's status line is sent with its first event, so an error before it has its own HTTP status. After it,
    an error is one event with the error object, and the stream ends without `[DONE]`.

    Args:
        name: of the endpoint, for logs and metrics.
        body: what the client sends.
        prepare_request: makes the request ready; raises RequestError.
        assembly: makes the answer.
        max_body: bytes a body may have.
    """

    def __init__(
        self,
        name: str,
        body: type[Body],
        prepare_request: Callable[[Body, LoadedModel, Caller], Coroutine[Any, Any, PreparedRequest]],
        assembly: Callable[[PreparedRequest, Body], ResponseBuilder],
        backend: Backend,
        loader: ModelLoader,
        metrics: Metrics,
        kind: Kind,
        max_body: int,
    ) -> None:
        self._name = name
        self._body = body
        self._new_job = prepare_request
        self._assembly = assembly
        self._backend = backend
        self._loader = loader
        self._metrics = metrics
        self._kind: Kind = kind
        self._max_body = max_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Caller(request_id_of(scope), self._kind)
        out = _Out(scope, receive, send)
        with self._metrics.track(self._name) as observation:
            try:
                body = await read_body(scope, receive, self._max_body)
                await unless_gone(receive, self._answer(body, caller, out, observation))
                observation.outcome = "ok"
            except ClientGone as error:
                observation.failed(error)
            except RequestError as error:
                observation.failed(error)
                await out.error(error)
            except Exception as error:
                log.exception("request %s: %s failed", caller.request_id, self._name)
                observation.failed(error)
                await out.error(unexpected())
            finally:
                log.debug("request %s: %s ended: %s", caller.request_id, self._name, observation.outcome)

    async def _answer(self, raw: bytes, caller: Caller, out: _Out, observation: Observation) -> None:
        body = parse(raw, self._body)
        model = await self._loader.get()
        if body.model is not None and body.model != model.card.name:
            raise ModelNotFound(f"there is no model {body.model!r} here; it is {model.card.name!r}", param="model")
        job = await self._new_job(body, model, caller)
        self._metrics.prompt_tokens.inc(job.prompt_tokens)
        _log_job(job, self._name)
        assembly = self._assembly(job, body)
        async with aclosing(generate(self._backend, job, observation)) as pieces:
            if body.stream:
                await _stream(pieces, assembly, out)
            else:
                await out.whole(assembly.whole(await _collect(pieces, len(job.sequences))))


class _Out:
    """Where an answer goes, and how much of it went."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._streaming = False

    async def event(self, answer: Answer | dict[str, Any]) -> None:
        if not self._streaming:
            self._streaming = True
            await self._send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await self._part(b"data: " + encode(answer) + b"\n\n", more=True)

    async def done(self) -> None:
        await self._part(DONE, more=False)

    async def whole(self, answer: Answer) -> None:
        await json_response(answer)(self._scope, self._receive, self._send)

    async def error(self, error: RequestError) -> None:
        if not self._streaming:
            await error_response(error)(self._scope, self._receive, self._send)
            return
        await self.event(error_body(error))
        await self._part(b"", more=False)

    async def _part(self, body: bytes, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises BodyTooLarge as soon as it is known to be, and ClientGone."""
    headers = dict(scope["headers"])
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > limit:
        raise BodyTooLarge(f"the body has {int(length)} bytes; at most {limit} are taken")
    parts, size = [], 0
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise BodyTooLarge(f"the body has more than the {limit} bytes that are taken")
        if not message.get("more_body", False):
            return b"".join(parts)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Awaits `work`; cancels it and raises ClientGone when the client closes its connection first."""
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


async def _stream(pieces: AsyncGenerator[TextChunk, None], assembly: ResponseBuilder, out: _Out) -> None:
    async for piece in pieces:
        await out.event(assembly.event(piece))
    if assembly.usage_at_end:
        await out.event(assembly.usage_event())
    await out.done()


async def _collect(pieces: AsyncGenerator[TextChunk, None], choices: int) -> list[TextChunk]:
    parts: list[list[TextChunk]] = [[] for _ in range(choices)]
    async for piece in pieces:
        parts[piece.index].append(piece)
    return [joined(one) for one in parts]


def _log_job(job: PreparedRequest, name: str) -> None:
    counts = f"{len(job.sequences)} sequences, {job.prompt_tokens} prompt tokens"
    user = (job.body.user or "")[:128]
    log.info("request %s: %s, %s%s", job.caller.request_id, name, counts, f", user {user!r}" if user else "")

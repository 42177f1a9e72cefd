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
from tandem.api.door import Admission, Door
from tandem.api.generation import generate
from tandem.api.http_errors import BodyTooLarge, ClientGone, ModelNotFound, TooSlow, clipped, unexpected
from tandem.api.loaded_model import LoadedModel, ModelLoader
from tandem.api.metrics import Metrics, RequestMetrics
from tandem.api.middleware import client_name, request_id_of
from tandem.api.openai import Body, ChatBody
from tandem.api.output_processor import TextChunk, joined
from tandem.api.parsing import parse
from tandem.api.prepared_request import PreparedRequest
from tandem.api.response_builder import ResponseBuilder
from tandem.api.response_writer import DONE, ResponseWriter
from tandem.api.turnstile import Turnstile
from tandem.config_limits import LimitsSection
from tandem.errors import InvalidRequest, RequestError, Unavailable

log = logging.getLogger(__name__)

Kind = Literal["router", "engine"]


@dataclass(frozen=True, slots=True)
class Services:
    """Shared by all endpoints of an application; `create_app` explains most. `door` and `turnstile` let requests in."""

    backend: Backend
    loader: ModelLoader
    metrics: Metrics
    kind: Kind
    door: Door
    turnstile: Turnstile


@dataclass(frozen=True, slots=True)
class GenerateEndpoint(Generic[Body]):
    """An ASGI application that answers POST requests of one path.

    Args:
        name: of the endpoint, for logs and metrics.
        count: of the choices that a body asks for.
        prepare: turns the body into sequences for the backend, by request id; raises RequestError.
    """

    name: str
    body_type: type[Body]
    count: Callable[[Body], int]
    prepare: Callable[[str, Body, LoadedModel], Coroutine[Any, Any, PreparedRequest]]
    builder_type: type[ResponseBuilder[Body]]
    services: Services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = request_id_of(scope)
        services = self.services
        writer = ResponseWriter(scope, receive, send)
        with services.metrics.track(self.name) as metrics:
            try:
                with services.door.request(client_name(scope)) as admission:
                    raw = [await read_body(scope, receive, services.door.limits, admission)]
                    await unless_gone(receive, writer, self._respond(request_id, raw, admission, writer, metrics))
                metrics.outcome = "ok"
            except ClientGone:
                metrics.outcome = "aborted"
            except RequestError as error:
                metrics.outcome = error.code
                await writer.error(error)
            except asyncio.CancelledError:  # only the server cancels, when it stops; the task ends here all the same
                metrics.outcome = Unavailable.code
                await writer.error(Unavailable("the server is stopping; send the request again"))
            except Exception:
                log.exception("request %s: %s failed", request_id, self.name)
                metrics.outcome = RequestError.code
                await writer.error(unexpected())
            finally:
                log.debug("request %s: %s ended: %s", request_id, self.name, metrics.outcome)

    async def _respond(
        self,
        request_id: str,
        raw: list[bytearray],
        admission: Admission,
        writer: ResponseWriter,
        metrics: RequestMetrics,
    ) -> None:
        """Answer a request. `raw`: the one body, taken out so that it goes once it is parsed."""
        model = await self.services.loader.get()
        await self.services.turnstile.wait()
        body = parse(raw.pop(), self.body_type, model.card.max_model_len)
        self._check(body, model)
        admission.take_choices(self.count(body))
        request = await self.prepare(request_id, body, model)
        self.services.metrics.prompt_tokens.inc(request.prompt_tokens)
        self._log(request, body.user or "")
        builder = self.builder_type(request, body)
        async with aclosing(generate(self.services.backend, request, metrics)) as chunks:
            if body.stream:
                await _stream(chunks, builder, writer)
            else:
                await writer.whole(builder.whole(await _collect(chunks, len(request.sequences))))

    def _check(self, body: Body, model: LoadedModel) -> None:
        """Raise InvalidRequest for what is refused before any work on the prompt."""
        if body.model is not None and not model.card.is_called(body.model):
            raise ModelNotFound(
                f"there is no model {clipped(body.model)!r} here; it is {model.card.name!r}", param="model"
            )
        if body.kv_transfer_params is not None and self.services.kind == "router":
            raise InvalidRequest(
                "kv_transfer_params is for an engine's own API; a router chooses engines itself",
                param="kv_transfer_params",
            )
        limits = self.services.door.limits
        if isinstance(body, ChatBody) and len(body.messages) > limits.max_messages:
            raise InvalidRequest(
                f"there are {len(body.messages)} messages; at most {limits.max_messages} are taken", param="messages"
            )
        if (count := self.count(body)) > limits.max_choices:
            raise InvalidRequest(
                f"prompts times n is {count}; at most {limits.max_choices} are taken",
                param="n" if body.n is not None and body.n > 1 else "prompt",
            )

    def _log(self, request: PreparedRequest, user: str) -> None:
        counts = f"{len(request.sequences)} sequences, {request.prompt_tokens} prompt tokens"
        by_user = f", user {user[:128]!r}" if user else ""
        log.info("request %s: %s, %s%s", request.request_id, self.name, counts, by_user)


async def read_body(scope: Scope, receive: Receive, limits: LimitsSection, admission: Admission) -> bytearray:
    """Return the whole body.

    Raises BodyTooLarge as soon as it is known to be, Overloaded if there is no memory for it, TooSlow, and ClientGone.
    """
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > limits.max_body:
        raise BodyTooLarge(f"the body has {int(length)} bytes; at most {limits.max_body} are taken")
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                admission.take_bytes(len(part))
                body += part
                if len(body) > limits.max_body:
                    raise BodyTooLarge(f"the body has more than the {limits.max_body} bytes that are taken")
                if not message.get("more_body", False):
                    return body
    except TimeoutError:
        raise TooSlow(f"of the body only {len(body)} bytes came within {limits.body_timeout:g} s") from None


async def unless_gone(receive: Receive, writer: ResponseWriter, work: Coroutine[Any, Any, None]) -> None:
    """Await `work`; cancel it and raise ClientGone when the client closes its connection before it is answered."""
    working = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(_client_gone(receive))
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done() and not writer.answered:
            raise ClientGone
        await working
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
    keeping_alive = asyncio.create_task(writer.keep_alive())
    try:
        async for chunk in chunks:
            await writer.event(builder.event(chunk))
        if builder.usage_at_end:
            await writer.event(builder.usage_event())
        await writer.end(DONE)
    finally:
        keeping_alive.cancel()
        await asyncio.gather(keeping_alive, return_exceptions=True)


async def _collect(chunks: AsyncGenerator[TextChunk, None], choices: int) -> list[TextChunk]:
    parts: list[list[TextChunk]] = [[] for _ in range(choices)]
    async for chunk in chunks:
        parts[chunk.index].append(chunk)
    return [joined(one) for one in parts]

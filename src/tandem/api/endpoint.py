"""One generating request over HTTP: body in, response or events out, the client watched throughout."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic

from tandem.api.generation import generate
from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import Body, ChatBody
from tandem.api.output_processor import TextChunk, joined
from tandem.api.prepared_request import PreparedRequest
from tandem.api.request_frame import FramedEndpoint, OpenRequest, check_model
from tandem.api.response_builder import ResponseBuilder
from tandem.api.response_writer import DONE, ResponseWriter
from tandem.errors import InvalidRequest


@dataclass(frozen=True)
class GenerateEndpoint(FramedEndpoint, Generic[Body]):
    """Answers requests that generate, whole or as a stream.

    Args:
        count: of the choices that a body asks for.
        prepare: turns the body into sequences for the backend, by request id; raises RequestError.
    """

    body_type: type[Body]
    count: Callable[[Body], int]
    prepare: Callable[[str, Body, LoadedModel], Coroutine[Any, Any, PreparedRequest]]
    builder_type: type[ResponseBuilder[Body]]

    async def respond(self, request: OpenRequest) -> None:
        services, writer = self.services, request.writer
        model, body = await self.read(request, self.body_type)
        self._check(body, model)
        request.admission.take_choices(self.count(body))
        prepared = await self.prepare(request.id, body, model)
        services.metrics.prompt_tokens.inc(prepared.prompt_tokens)
        self.log_prepared(prepared, body.user)
        builder = self.builder_type(prepared, body)
        async with aclosing(generate(services.backend, prepared, request.metrics)) as chunks:
            if body.stream:
                await _stream(chunks, builder, writer)
            else:
                await writer.whole(builder.whole(await _collect(chunks, len(prepared.sequences))))

    def _check(self, body: Body, model: LoadedModel) -> None:
        """Raise InvalidRequest for what is refused before any work on the prompt."""
        check_model(body.model, model.card)
        if body.kv_transfer_params is not None and self.services.kind == "router":
            raise InvalidRequest(
                "kv_transfer_params is for an engine's own API; a router chooses engines itself",
                param="kv_transfer_params",
            )
        self.check_messages(body.messages if isinstance(body, ChatBody) else None)
        limits = self.services.door.limits
        if (count := self.count(body)) > limits.max_choices:
            raise InvalidRequest(
                f"prompts times n is {count}; at most {limits.max_choices} are taken",
                param="n" if body.n is not None and body.n > 1 else "prompt",
            )


async def _stream(
    chunks: AsyncGenerator[TextChunk, None], builder: ResponseBuilder[Any], writer: ResponseWriter
) -> None:
    async with keeping_alive(writer):
        async for chunk in chunks:
            await writer.event(builder.event(chunk))
        if builder.usage_at_end:
            await writer.event(builder.usage_event())
        await writer.end(DONE)


@asynccontextmanager
async def keeping_alive(writer: ResponseWriter) -> AsyncIterator[None]:
    """Begin a stream in time, and send comments where nothing else comes, until the block ends."""
    task = asyncio.create_task(writer.keep_alive())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _collect(chunks: AsyncGenerator[TextChunk, None], choices: int) -> list[TextChunk]:
    parts: list[list[TextChunk]] = [[] for _ in range(choices)]
    async for chunk in chunks:
        parts[chunk.index].append(chunk)
    return [joined(one) for one in parts]

"""Other APIs than OpenAI's first two: a body becomes a chat, and its answer is written as that API has it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec

from tandem.api.chat import prepare_chat
from tandem.api.endpoint import keeping_alive
from tandem.api.generation import generate
from tandem.api.http_errors import UnsupportedField, error_body
from tandem.api.openai import ChatBody, ChatMessage
from tandem.api.output_processor import TextChunk, joined
from tandem.api.prepared_request import PreparedRequest
from tandem.api.request_frame import FramedEndpoint, OpenRequest, check_model
from tandem.api.response_writer import ErrorShape
from tandem.errors import InvalidRequest, RequestError

Translated = TypeVar("Translated", bound=msgspec.Struct)
Fields = dict[str, Any]


def _error(error: RequestError) -> Fields:
    return {"type": "error", **error_body(error)}


class Answer(ABC, Generic[Translated]):
    """Writes the one answer to a body. Every event has its name as `type`."""

    def __init__(self, request: PreparedRequest, body: Translated) -> None:
        self.request = request
        self.body = body

    @abstractmethod
    def whole(self, chunk: TextChunk) -> Fields:
        """Return the whole response. `chunk`: all of the answer."""

    @abstractmethod
    def begin(self) -> Iterator[Fields]:
        """Yield the events before any text."""

    @abstractmethod
    def text(self, text: str) -> Iterator[Fields]:
        """Yield the events of new text."""

    @abstractmethod
    def end(self, chunk: TextChunk) -> Iterator[Fields]:
        """Yield the last events. `chunk`: all of the answer."""

    @property
    def cached_tokens(self) -> int:
        details = self.request.sequences[0].output.details
        return max(details.prefix_tokens.values(), default=0) if details is not None else 0


@dataclass(frozen=True)
class TranslatedEndpoint(FramedEndpoint, Generic[Translated]):
    """Answers requests of another API, whole or as a stream of named events.

    Args:
        to_chat: returns the body as a chat; raises InvalidRequest.
    """

    errors = ErrorShape(_error, b"event: error\n")

    body_type: type[Translated]
    to_chat: Callable[[Translated], ChatBody]
    answer_type: type[Answer[Translated]]

    async def respond(self, request: OpenRequest) -> None:
        services, writer = self.services, request.writer
        model, body = await self.read(request, self.body_type)
        chat = self.to_chat(body)
        check_model(chat.model, model.card)
        self.check_messages(chat.messages)
        request.admission.take_choices(1)
        prepared = await prepare_chat(request.id, chat, model)
        services.metrics.prompt_tokens.inc(prepared.prompt_tokens)
        self.log_prepared(prepared, chat.user)
        answer = self.answer_type(prepared, body)
        chunks: list[TextChunk] = []
        async with aclosing(generate(services.backend, prepared, request.metrics)) as parts:
            if not chat.stream:
                chunks = [part async for part in parts]
                await writer.whole(answer.whole(joined(chunks)))
                return
            async with keeping_alive(writer):
                async for part in parts:
                    if not chunks:
                        await self._send(request, answer.begin())
                    chunks.append(part)
                    if part.text:
                        await self._send(request, answer.text(part.text))
                await self._send(request, answer.end(joined(chunks)))
                await writer.end(b"")

    async def _send(self, request: OpenRequest, events: Iterator[Fields]) -> None:
        for event in events:
            await request.writer.event(event, event["type"])


def text_of(content: Any, place: str, kinds: Sequence[str]) -> str:
    """Return the text of a content that is a string or a list of parts of these kinds. Raises InvalidRequest."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{place}: a text or a list of parts was expected", param=place)
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise UnsupportedField(
                f"{place}[{index}]: only parts of type {' or '.join(kinds)}, with `text`, are supported", param=place
            )
        texts.append(part["text"])
    return "\n".join(texts)


def message(one: Any, place: str, kinds: Sequence[str], roles: Sequence[str]) -> ChatMessage:
    """Return one message of a list. Raises InvalidRequest."""
    if not isinstance(one, dict) or one.get("type", "message") != "message":
        raise UnsupportedField(f"{place}: only messages are supported", param=place)
    if one.get("role") not in roles:
        raise InvalidRequest(f"{place}.role: one of {', '.join(roles)} was expected", param=f"{place}.role")
    return ChatMessage(one["role"], text_of(one.get("content"), f"{place}.content", kinds))

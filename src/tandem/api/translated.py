"""Other APIs than OpenAI's first two: a body becomes a chat, and its answer is written as that API has it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import msgspec

from tandem.api.answer_parts import AnswerParts, CallPart, ContentPart, ReasoningPart
from tandem.api.chat import prepare_chat
from tandem.api.endpoint import keeping_alive
from tandem.api.generation import generate
from tandem.api.http_errors import UnsupportedField, error_body
from tandem.api.openai import ChatBody, ChatMessage, MessageToolCall
from tandem.api.output_processor import TextChunk, joined
from tandem.api.prepared_request import PreparedRequest
from tandem.api.request_frame import FramedEndpoint, OpenRequest, check_model
from tandem.api.response_writer import ErrorShape
from tandem.errors import InvalidRequest, RequestError

Translated = TypeVar("Translated", bound=msgspec.Struct)
Fields = dict[str, Any]


def _error(error: RequestError) -> Fields:
    return {"type": "error", **error_body(error)}


NAMED = ErrorShape(_error, b"event: error\n")
"""Errors as clients of these APIs notice them."""


@dataclass(slots=True)
class Block:
    """One item of an answer: reasoning, text or a call. `text`: what it has so far; of a call, its arguments."""

    index: int
    kind: Literal["reasoning", "text", "call"]
    text: str = ""
    call_id: str = ""
    name: str = ""


class Answer(ABC, Generic[Translated]):
    """Writes the one answer to a body. Every event has its name as `type`."""

    def __init__(self, request: PreparedRequest, body: Translated, chat: ChatBody) -> None:
        self.request = request
        self.body = body
        self.blocks: list[Block] = []
        self._parts = AnswerParts(chat, request.model, request.sequences[0])
        self._space = ""
        self._open = False

    @abstractmethod
    def whole(self, chunk: TextChunk, finish_reason: str | None) -> Fields:
        """Return the whole response, of `blocks`. `chunk`: all of the answer."""

    @abstractmethod
    def begin(self) -> Iterator[Fields]:
        """Yield the events before any block."""

    @abstractmethod
    def opened(self, block: Block) -> Iterator[Fields]:
        """Yield the events with which a block begins."""

    @abstractmethod
    def grown(self, block: Block, more: str) -> Iterator[Fields]:
        """Yield the events of more text of a block."""

    @abstractmethod
    def closed(self, block: Block) -> Iterator[Fields]:
        """Yield the events with which a block ends."""

    @abstractmethod
    def end(self, chunk: TextChunk, finish_reason: str | None) -> Iterator[Fields]:
        """Yield the last events. `chunk`: all of the answer."""

    @property
    def finish_reason(self) -> str | None:
        return self._parts.finish_reason

    def add(self, chunk: TextChunk) -> Iterator[Fields]:
        """Yield the events of the next chunk. Space before a call is no text."""
        for part in self._parts.read(chunk):
            match part:
                case ReasoningPart(text):
                    yield from self._grow("reasoning", text)
                case ContentPart(text):
                    text = self._space + text
                    shown = text.rstrip()
                    self._space = text[len(shown) :]
                    if shown:
                        yield from self._grow("text", shown)
                case CallPart():
                    self._space = ""
                    if part.name is not None:
                        yield from self._close()
                        self.blocks.append(Block(len(self.blocks), "call", "", part.id, part.name))
                        self._open = True
                        yield from self.opened(self.blocks[-1])
                    if part.arguments:
                        yield from self._grow("call", part.arguments)
        if chunk.finish_reason is not None:
            if self._in("text") or not any(block.kind != "reasoning" for block in self.blocks):
                yield from self._grow("text", self._space)
            yield from self._close()

    def _in(self, kind: str) -> bool:
        return self._open and self.blocks[-1].kind == kind

    def _grow(self, kind: Literal["reasoning", "text", "call"], more: str) -> Iterator[Fields]:
        if not self._in(kind):
            yield from self._close()
            self.blocks.append(Block(len(self.blocks), kind))
            self._open = True
            yield from self.opened(self.blocks[-1])
        self.blocks[-1].text += more
        if more:
            yield from self.grown(self.blocks[-1], more)

    def _close(self) -> Iterator[Fields]:
        if self._open:
            self._open = False
            yield from self.closed(self.blocks[-1])

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

    errors = NAMED

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
        answer = self.answer_type(prepared, body, chat)
        chunks: list[TextChunk] = []
        async with aclosing(generate(services.backend, prepared, request.metrics)) as parts:
            if not chat.stream:
                chunk = joined([part async for part in parts])
                for _ in answer.add(chunk):
                    pass
                await writer.whole(answer.whole(chunk, answer.finish_reason))
                return
            async with keeping_alive(writer):
                async for part in parts:
                    if not chunks:
                        await self._send(request, answer.begin())
                    chunks.append(part)
                    await self._send(request, answer.add(part))
                await self._send(request, answer.end(joined(chunks), answer.finish_reason))
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


def message(one: dict[str, Any], place: str, kinds: Sequence[str], roles: Sequence[str]) -> ChatMessage:
    """Return one message of a list. Raises InvalidRequest."""
    if one.get("role") not in roles:
        raise InvalidRequest(f"{place}.role: one of {', '.join(roles)} was expected", param=f"{place}.role")
    return ChatMessage(one["role"], text_of(one.get("content"), f"{place}.content", kinds))


def called(call_id: Any, name: Any, arguments: Any, place: str) -> MessageToolCall:
    """Return a call of a conversation; `arguments`: JSON. Raises InvalidRequest."""
    given = {"id": call_id, "function": {"name": name, "arguments": arguments}}
    try:
        return msgspec.convert(given, MessageToolCall)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{place}: {error}", param=place) from None


def joins_calls(messages: list[ChatMessage], call: MessageToolCall, reasoning: str | None) -> None:
    """Add a call to the message of the assistant that the conversation ends with, or to a new one."""
    last = messages[-1] if messages else None
    if last is None or last.role != "assistant" or reasoning is not None:
        messages.append(ChatMessage("assistant", "", tool_calls=[call], reasoning_content=reasoning))
    else:
        calls = [*(last.tool_calls or []), call]
        messages[-1] = msgspec.structs.replace(last, tool_calls=calls)

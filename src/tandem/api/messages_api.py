"""Anthropic's /v1/messages: create, whole or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

from tandem.api.openai import MAX_STOPS, ChatBody, ChatMessage, Stop
from tandem.api.output_processor import TextChunk
from tandem.api.translated import Answer, Fields, message, text_of

PARTS = ("text",)
ROLES = ("user", "assistant")


class MessagesBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    NOT_SERVED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "container": (),
        "mcp_servers": ([],),
        "thinking": ({"type": "disabled"},),
        "tool_choice": ({"type": "auto"}, {"type": "none"}),
        "tools": ([],),
    }

    model: str
    max_tokens: Annotated[int, Meta(ge=1)]
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    stop_sequences: Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None


def to_chat(body: MessagesBody) -> ChatBody:
    """Return the chat that a body asks for; one that ends with the assistant goes on there. Raises InvalidRequest."""
    messages = [message(one, f"messages[{index}]", PARTS, ROLES) for index, one in enumerate(body.messages)]
    goes_on = messages[-1].role == "assistant"
    if body.system:
        messages.insert(0, ChatMessage("system", text_of(body.system, "system", PARTS)))
    return ChatBody(
        messages=messages,
        model=body.model,
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences or None,
        continue_final_message=goes_on,
        stream=body.stream,
    )


class MessagesAnswer(Answer[MessagesBody]):
    """One block of text."""

    def whole(self, chunk: TextChunk) -> Fields:
        content = [{"type": "text", "text": chunk.text}]
        return self._message(content) | _stop(chunk) | {"usage": self._usage(), "tandem": chunk.details}

    def begin(self) -> Iterator[Fields]:
        yield {"type": "message_start", "message": self._message([]) | {"usage": self._usage()}}
        yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}

    def text(self, text: str) -> Iterator[Fields]:
        yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}

    def end(self, chunk: TextChunk) -> Iterator[Fields]:
        yield {"type": "content_block_stop", "index": 0}
        yield {"type": "message_delta", "delta": _stop(chunk), "usage": self._usage()}
        yield {"type": "message_stop"}

    def _message(self, content: list[Fields]) -> Fields:
        return {
            "id": f"msg_{self.request.request_id}",
            "type": "message",
            "role": "assistant",
            "model": self.request.model.card.name,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def _usage(self) -> Fields:
        cached = min(self.cached_tokens, self.request.prompt_tokens)
        return {
            "input_tokens": self.request.prompt_tokens - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self.request.output_tokens,
        }


def _stop(chunk: TextChunk) -> Fields:
    if isinstance(chunk.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": chunk.stop_reason}
    return {"stop_reason": "max_tokens" if chunk.finish_reason == "length" else "end_turn", "stop_sequence": None}

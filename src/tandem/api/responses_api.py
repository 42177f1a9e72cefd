"""OpenAI's /v1/responses: create, whole or as a stream. Nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec

from tandem.api.http_errors import UnsupportedField
from tandem.api.openai import ChatBody, ChatMessage
from tandem.api.output_processor import TextChunk
from tandem.api.translated import Answer, Fields, message, text_of
from tandem.errors import InvalidRequest

PARTS = ("input_text", "output_text", "text")
ROLES = ("system", "developer", "user", "assistant")
TOOL_CHOICES = ("auto", "none")
"""Those that ask for no call, as there are no tools."""


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    NOT_SERVED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "conversation": (),
        "include": ([],),
        "previous_response_id": (),
        "prompt": (),
        "reasoning": ({}, {"effort": None}, {"effort": None, "summary": None}),
        "stream_options": ({}, {"include_obfuscation": False}),
        "text": ({}, {"format": {"type": "text"}}),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    user: str | None = None
    stream: bool | None = None
    max_tool_calls: int | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Any = None


def to_chat(body: ResponsesBody) -> ChatBody:
    """Return the chat that a body asks for. Raises InvalidRequest."""
    if body.tool_choice not in (None, *TOOL_CHOICES):
        raise UnsupportedField("`tool_choice` is not supported here; leave it out", param="tool_choice")
    given = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    if not given:
        raise InvalidRequest("input is empty", param="input")
    messages = [message(one, f"input[{index}]", PARTS, ROLES) for index, one in enumerate(given)]
    if body.instructions is not None:
        messages.insert(0, ChatMessage("system", text_of(body.instructions, "instructions", PARTS)))
    return ChatBody(
        messages=messages,
        model=body.model,
        max_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        user=body.user,
        stream=body.stream,
    )


class ResponsesAnswer(Answer[ResponsesBody]):
    """One message of text. `sequence_number` counts the events."""

    _number = -1

    def whole(self, chunk: TextChunk) -> Fields:
        cut = chunk.finish_reason == "length"
        response = self._response("incomplete" if cut else "completed", [self._item(chunk.text, cut)])
        tokens = (self.request.prompt_tokens, self.request.output_tokens)
        response["incomplete_details"] = {"reason": "max_output_tokens"} if cut else None
        response["usage"] = {
            "input_tokens": tokens[0],
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": tokens[1],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sum(tokens),
        }
        return response | {"tandem": chunk.details}

    def begin(self) -> Iterator[Fields]:
        for name in ("created", "in_progress"):
            yield self._event(name, response=self._response("in_progress", []))
        item = self._item("", False) | {"status": "in_progress", "content": []}
        yield self._event("output_item.added", output_index=0, item=item)
        yield self._event("content_part.added", **self._place, part=_part(""))

    def text(self, text: str) -> Iterator[Fields]:
        yield self._event("output_text.delta", **self._place, delta=text, logprobs=[])

    def end(self, chunk: TextChunk) -> Iterator[Fields]:
        response = self.whole(chunk)
        yield self._event("output_text.done", **self._place, text=chunk.text, logprobs=[])
        yield self._event("content_part.done", **self._place, part=_part(chunk.text))
        yield self._event("output_item.done", output_index=0, item=response["output"][0])
        yield self._event(response["status"], response=response)

    @property
    def _item_id(self) -> str:
        return f"msg_{self.request.request_id}"

    @property
    def _place(self) -> Fields:
        return {"item_id": self._item_id, "output_index": 0, "content_index": 0}

    def _event(self, name: str, **fields: Any) -> Fields:
        self._number += 1
        return {"type": f"response.{name}", "sequence_number": self._number, **fields}

    def _item(self, text: str, cut: bool) -> Fields:
        status = "incomplete" if cut else "completed"
        content = [_part(text)]
        return {"id": self._item_id, "type": "message", "status": status, "role": "assistant", "content": content}

    def _response(self, status: str, output: list[Fields]) -> Fields:
        body, sampling = self.body, self.request.sequences[0].request.sampling
        return {
            "id": f"resp_{self.request.request_id}",
            "object": "response",
            "created_at": self.request.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": {},
            "model": self.request.model.card.name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }


def _part(text: str) -> Fields:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

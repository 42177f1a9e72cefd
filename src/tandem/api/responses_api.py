"""OpenAI's /v1/responses: create, whole or as a stream. Nothing is stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec

from tandem.api.http_errors import UnsupportedField, clipped
from tandem.api.openai import ChatBody, ChatMessage, Effort, Tool
from tandem.api.output_processor import TextChunk
from tandem.api.parsing import convert
from tandem.api.translated import Answer, Block, Fields, called, joins_calls, message, text_of
from tandem.errors import InvalidRequest

PARTS = ("input_text", "output_text", "text")
ROLES = ("system", "developer", "user", "assistant")
ENCRYPTED = "reasoning.encrypted_content"
"""Asks that reasoning can be sent back where nothing is stored; here it is sent back as text."""


class ResponsesBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    NOT_SERVED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "background": (False,),
        "conversation": (),
        "include": ([], [ENCRYPTED]),
        "previous_response_id": (),
        "prompt": (),
        "stream_options": ({}, {"include_obfuscation": False}),
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
    tool_choice: str | dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None


def to_chat(body: ResponsesBody) -> ChatBody:
    """Return the chat that a body asks for. Raises InvalidRequest."""
    given = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    if not given:
        raise InvalidRequest("input is empty", param="input")
    messages = _messages(given)
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
        tools=[_tool(one, f"tools[{index}]") for index, one in enumerate(body.tools or [])] or None,
        tool_choice=_tool_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text),
        reasoning_effort=_effort(body.reasoning),
    )


def _messages(items: list[dict[str, Any]]) -> list[ChatMessage]:
    """Return the messages of a conversation's items: reasoning and calls are parts of the assistant's message."""
    messages: list[ChatMessage] = []
    reasoning: str | None = None
    for index, item in enumerate(items):
        place = f"input[{index}]"
        match item.get("type", "message"):
            case "message":
                one = message(item, place, PARTS, ROLES)
                own = reasoning if one.role == "assistant" else None
                messages.append(msgspec.structs.replace(one, reasoning_content=own))
            case "function_call":
                call = called(item.get("call_id"), item.get("name"), item.get("arguments"), place)
                joins_calls(messages, call, reasoning)
            case "function_call_output":
                if not isinstance(item.get("call_id"), str):
                    raise InvalidRequest(f"{place}.call_id: a string was expected", param=f"{place}.call_id")
                text = text_of(item.get("output"), f"{place}.output", PARTS)
                messages.append(ChatMessage("tool", text, tool_call_id=item["call_id"]))
            case "reasoning":
                reasoning = _reasoning(item, place)
                continue
            case kind:
                raise UnsupportedField(
                    f"{place}: items of type {clipped(str(kind))!r} are not supported, as nothing is stored and no tool"
                    " is run here; message, function_call, function_call_output and reasoning are",
                    param=place,
                )
        reasoning = None
    return messages


def _reasoning(item: dict[str, Any], place: str) -> str | None:
    """Return the text of earlier reasoning; None where it has none that can be read."""
    for name, kind in (("content", "reasoning_text"), ("summary", "summary_text")):
        if text := text_of(item.get(name) or [], f"{place}.{name}", (kind,)):
            return text
    return None


def _tool(one: dict[str, Any], place: str) -> Tool:
    if one.get("type") != "function":
        raise UnsupportedField(
            f"{place}: tools of type {clipped(str(one.get('type')))!r} run on OpenAI's servers; only functions, which"
            " the client runs, are supported",
            param="tools",
        )
    function = {name: value for name, value in one.items() if name != "type" and value is not None}
    try:
        return msgspec.convert({"type": "function", "function": function}, Tool)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{place}: {error}", param="tools") from None


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if not isinstance(choice, dict):
        if choice not in (None, "auto", "none", "required"):
            raise InvalidRequest("tool_choice is none, auto, required or a function", param="tool_choice")
        return choice
    if choice.get("type") != "function":
        raise UnsupportedField("tool_choice: only a function can be chosen", param="tool_choice")
    return {"type": "function", "function": {"name": choice.get("name")}}


def _format(text: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the chat's `response_format`."""
    if unknown := (text or {}).keys() - {"format", "verbosity"}:
        raise UnsupportedField(f"text.{clipped(min(unknown))} is not supported; leave it out", param="text")
    form = (text or {}).get("format")
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        if form is not None and form not in ({"type": "text"}, {"type": "json_object"}):
            raise InvalidRequest("text.format is of type text, json_object or json_schema", param="text")
        return form
    return {"type": "json_schema", "json_schema": {name: value for name, value in form.items() if name != "type"}}


def _effort(reasoning: dict[str, Any] | None) -> Any:
    """Return the effort. Reasoning comes whole, where a summary is asked for too."""
    if unknown := (reasoning or {}).keys() - {"effort", "summary", "generate_summary"}:
        raise UnsupportedField(f"reasoning.{clipped(min(unknown))} is not supported; leave it out", param="reasoning")
    return convert({"effort": (reasoning or {}).get("effort")}, _Reasoning).effort


class _Reasoning(msgspec.Struct, frozen=True):
    effort: Effort | None = None


class ResponsesAnswer(Answer[ResponsesBody]):
    """Reasoning, messages of text, and function calls. `sequence_number` counts the events."""

    _number = -1

    def whole(self, chunk: TextChunk, finish_reason: str | None) -> Fields:
        cut = finish_reason == "length"
        last = len(self.blocks) - 1
        items = [self._item(one, "incomplete" if cut and one.index == last else "completed") for one in self.blocks]
        response = self._response("incomplete" if cut else "completed", items)
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

    def opened(self, block: Block) -> Iterator[Fields]:
        bare = self._item(block, "in_progress")
        if block.kind != "call":
            bare["content"] = []
        yield self._event("output_item.added", output_index=block.index, item=bare)
        if block.kind != "call":
            yield self._event("content_part.added", **self._place(block), part=_part(block))

    def grown(self, block: Block, more: str) -> Iterator[Fields]:
        yield self._event(f"{_EVENTS[block.kind]}.delta", **self._place(block), delta=more, **_beside(block))

    def closed(self, block: Block) -> Iterator[Fields]:
        name = f"{_EVENTS[block.kind]}.done"
        if block.kind == "call":
            yield self._event(name, **self._place(block), name=block.name, arguments=block.text)
        else:
            yield self._event(name, **self._place(block), text=block.text, **_beside(block))
            yield self._event("content_part.done", **self._place(block), part=_part(block))
        status = "incomplete" if self.finish_reason == "length" else "completed"
        yield self._event("output_item.done", output_index=block.index, item=self._item(block, status))

    def end(self, chunk: TextChunk, finish_reason: str | None) -> Iterator[Fields]:
        response = self.whole(chunk, finish_reason)
        yield self._event(response["status"], response=response)

    def _id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self.request.request_id}_{block.index}"

    def _place(self, block: Block) -> Fields:
        place = {"item_id": self._id(block), "output_index": block.index}
        return place if block.kind == "call" else place | {"content_index": 0}

    def _item(self, block: Block, status: str) -> Fields:
        item: Fields = {"id": self._id(block), "status": status}
        match block.kind:
            case "call":
                call = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
                return item | {"type": "function_call"} | call
            case "reasoning":
                return item | {"type": "reasoning", "summary": [], "content": [_part(block)], "encrypted_content": None}
            case "text":
                return item | {"type": "message", "role": "assistant", "content": [_part(block)]}

    def _event(self, name: str, /, **fields: Any) -> Fields:
        self._number += 1
        return {"type": f"response.{name}", "sequence_number": self._number, **fields}

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
            "reasoning": body.reasoning or {"effort": None, "summary": None},
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.user,
        }


_EVENTS = {"reasoning": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}
_PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}


def _part(block: Block) -> Fields:
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": []}


def _beside(block: Block) -> Fields:
    return {"logprobs": []} if block.kind == "text" else {}

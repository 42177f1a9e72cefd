"""Anthropic's /v1/messages: create, whole or as a stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta

from tandem.api.http_errors import UnsupportedField, clipped
from tandem.api.openai import MAX_STOPS, ChatBody, ChatMessage, Function, Stop, Tool
from tandem.api.output_processor import TextChunk
from tandem.api.parsing import convert
from tandem.api.translated import Answer, Block, Fields, called, joins_calls, message, text_of
from tandem.errors import InvalidRequest

PARTS = ("text",)
ROLES = ("user", "assistant")


class GivenTool(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A tool that the client runs. Where it is cached, and how early its input comes, asks nothing of the model."""

    name: str
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: Any = None
    eager_input_streaming: bool | None = None


class ToolChoice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`budget_tokens`: a hint; what bounds an answer, thoughts and all, is `max_tokens`."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized"] | None = None


class JsonFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    effort: Literal["low", "medium", "high", "xhigh"] | None = None
    format: JsonFormat | None = None


class Conversation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is counted: `/v1/messages/count_tokens`."""

    NOT_SERVED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **dict.fromkeys(("container", "inference_geo", "context_management"), ()),
        "mcp_servers": ([],),
    }

    model: str
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Any = None


class MessagesBody(Conversation, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_tokens: Annotated[int, Meta(ge=1)]
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: float | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    stop_sequences: Annotated[list[Stop], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None


def conversation(body: Conversation) -> ChatBody:
    """Return the chat of a body; one that ends with the assistant's text goes on there. Raises InvalidRequest."""
    messages: list[ChatMessage] = []
    for index, one in enumerate(body.messages):
        _add_message(messages, one, f"messages[{index}]")
    goes_on = bool(messages) and messages[-1].role == "assistant"
    if body.system:
        messages.insert(0, ChatMessage("system", text_of(body.system, "system", PARTS)))
    config, choice = body.output_config or OutputConfig(), body.tool_choice
    form = None if config.format is None else {"name": "answer", "schema": config.format.schema}
    thinks = None if body.thinking is None else {"enable_thinking": body.thinking.type != "disabled"}
    return ChatBody(
        messages=messages,
        model=body.model,
        tools=[_tool(one, f"tools[{index}]") for index, one in enumerate(body.tools or [])] or None,
        tool_choice=_tool_choice(choice) if body.tools else None,
        parallel_tool_calls=False if choice is not None and choice.disable_parallel_tool_use else None,
        response_format=None if form is None else {"type": "json_schema", "json_schema": form},
        reasoning_effort=config.effort,
        chat_template_kwargs=thinks,
        continue_final_message=goes_on,
    )


def to_chat(body: MessagesBody) -> ChatBody:
    """Return the chat that a body asks for. Raises InvalidRequest."""
    return msgspec.structs.replace(
        conversation(body),
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences or None,
        stream=body.stream,
    )


def _add_message(messages: list[ChatMessage], one: dict[str, Any], place: str) -> None:
    """Add a message; results of tools are messages of their own, calls and thoughts parts of the assistant's."""
    content = one.get("content")
    if not isinstance(content, list) or one.get("role") not in ROLES:
        messages.append(message(one, place, PARTS, ROLES))
        return
    role, texts = one["role"], list[dict[str, Any]]()
    thoughts: str | None = None
    calls = []
    for index, block in enumerate(content):
        at = f"{place}.content[{index}]"
        kind = block.get("type") if isinstance(block, dict) else None
        match role, kind:
            case "user", "tool_result":
                messages.append(_result(block, at))
            case "assistant", "tool_use":
                arguments = json.dumps(block.get("input"), ensure_ascii=False)
                calls.append(called(block.get("id"), block.get("name"), arguments, at))
            case "assistant", "thinking":
                thoughts = (thoughts or "") + str(block.get("thinking", ""))
            case "assistant", "redacted_thinking":  # what nobody can read here
                pass
            case _:
                texts.append(block)
    if texts or not content or thoughts is not None:
        text = text_of(texts, f"{place}.content", PARTS)
        messages.append(ChatMessage(role, text, reasoning_content=thoughts))
    elif calls:
        messages.append(ChatMessage(role, ""))
    for call in calls:
        joins_calls(messages, call, None)


def _result(block: dict[str, Any], place: str) -> ChatMessage:
    if not isinstance(block.get("tool_use_id"), str):
        raise InvalidRequest(f"{place}.tool_use_id: a string was expected", param=f"{place}.tool_use_id")
    text = text_of(block.get("content") or "", f"{place}.content", PARTS)
    return ChatMessage("tool", text, tool_call_id=block["tool_use_id"])


def _tool(one: dict[str, Any], place: str) -> Tool:
    if one.get("type") not in (None, "custom"):
        raise UnsupportedField(
            f"{place}: tools of type {clipped(str(one['type']))!r} are Anthropic's own; only tools with an"
            " input_schema, which the client runs, are supported",
            param="tools",
        )
    given = convert({"tools": [one]}, _Tools).tools[0]
    return Tool("function", Function(given.name, given.description, given.input_schema, given.strict))


class _Tools(msgspec.Struct, frozen=True):
    tools: list[GivenTool]


def _tool_choice(choice: ToolChoice | None) -> str | dict[str, Any] | None:
    match choice:
        case None:
            return None
        case ToolChoice(type="tool"):
            return {"type": "function", "function": {"name": choice.name}}
        case ToolChoice(type="any"):
            return "required"
    return choice.type


class MessagesAnswer(Answer[MessagesBody]):
    """Thoughts, text and calls, each a block."""

    def whole(self, chunk: TextChunk, finish_reason: str | None) -> Fields:
        content = [_block(one, one.text) for one in self.blocks]
        return self._message(content) | _stop(chunk, finish_reason) | {"usage": self._usage(), "tandem": chunk.details}

    def begin(self) -> Iterator[Fields]:
        yield {"type": "message_start", "message": self._message([]) | {"usage": self._usage()}}

    def opened(self, block: Block) -> Iterator[Fields]:
        yield {"type": "content_block_start", "index": block.index, "content_block": _block(block, "")}

    def grown(self, block: Block, more: str) -> Iterator[Fields]:
        delta = {"type": _DELTAS[block.kind][0], _DELTAS[block.kind][1]: more}
        yield {"type": "content_block_delta", "index": block.index, "delta": delta}

    def closed(self, block: Block) -> Iterator[Fields]:
        yield {"type": "content_block_stop", "index": block.index}

    def end(self, chunk: TextChunk, finish_reason: str | None) -> Iterator[Fields]:
        yield {"type": "message_delta", "delta": _stop(chunk, finish_reason), "usage": self._usage()}
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


_DELTAS = {
    "reasoning": ("thinking_delta", "thinking"),
    "text": ("text_delta", "text"),
    "call": ("input_json_delta", "partial_json"),
}


def _block(block: Block, text: str) -> Fields:
    """Return a content block. The input of a call that is cut is empty, as it is no JSON."""
    match block.kind:
        case "reasoning":
            return {"type": "thinking", "thinking": text, "signature": ""}
        case "text":
            return {"type": "text", "text": text}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(text)}


def _input(arguments: str) -> Any:
    try:
        value = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _stop(chunk: TextChunk, finish_reason: str | None) -> Fields:
    if isinstance(chunk.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": chunk.stop_reason}
    reasons = {"length": "max_tokens", "tool_calls": "tool_use"}
    return {"stop_reason": reasons.get(finish_reason or "", "end_turn"), "stop_sequence": None}

"""Tools of a chat: what the model is told of them, what it must call, and how calls show in an answer."""

from __future__ import annotations

import json
from typing import Any

from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import ChatBody, ChatMessage, MessageToolCall, Tool
from tandem.api.structured import of_schema
from tandem.api.tool_syntaxes import FORCED, ToolSyntax
from tandem.errors import InvalidRequest
from tandem.wire.grammar import Grammar

MAX_CALLS = 16
_ANY: dict[str, Any] = {"type": "object"}
_DEFS = "#/$defs/"


def forced_tools(body: ChatBody) -> list[Tool]:
    """Return the tools of which one must be called; none where the model may choose. Raises InvalidRequest."""
    tools, choice = body.tools or [], body.tool_choice
    if choice is None or choice in ("none", "auto"):
        return []
    if not tools:
        raise InvalidRequest("tool_choice asks for a call, but there are no tools", param="tool_choice")
    if choice == "required":
        return tools
    name = choice.get("function", {}).get("name") if isinstance(choice, dict) else None
    named = [tool for tool in tools if tool.function.name == name]
    if not named:
        raise InvalidRequest(
            "tool_choice is none, auto, required or a function that is one of the tools", param="tool_choice"
        )
    return named


def tool_grammar(body: ChatBody) -> Grammar | None:
    """Return the grammar of the calls that must be made."""
    forced = forced_tools(body)
    if not forced:
        return None
    one = isinstance(body.tool_choice, dict) or body.parallel_tool_calls is False
    calls: list[dict[str, Any]] = []
    defs: dict[str, Any] = {}
    for number, tool in enumerate(forced):
        parameters, own = _hoisted(tool.function.parameters or _ANY, f"{number}.")
        defs |= own
        call = {"name": {"const": tool.function.name}, "parameters": parameters}
        calls.append({"type": "object", "properties": call, "required": list(call), "additionalProperties": False})
    schema = {"type": "array", "minItems": 1, "maxItems": 1 if one else MAX_CALLS, "items": {"anyOf": calls}}
    return of_schema(schema | ({"$defs": defs} if defs else {}))


def _hoisted(parameters: Any, prefix: str) -> tuple[Any, dict[str, Any]]:
    """Return a schema that may stand within another, and its definitions for the root, where `$ref` starts.

    Tools may have definitions of one name, so each one's names get a `prefix`.
    """
    if not isinstance(parameters, dict) or "$defs" not in parameters:
        return parameters, {}
    moved = _with_refs(parameters, f"{_DEFS}{prefix}")
    return moved, {f"{prefix}{name}": value for name, value in moved.pop("$defs").items()}


def _with_refs(schema: Any, start: str) -> Any:
    """Return a copy of a schema whose references to definitions start otherwise."""
    if isinstance(schema, list):
        return [_with_refs(one, start) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: start + value.removeprefix(_DEFS)
        if key == "$ref" and isinstance(value, str) and value.startswith(_DEFS)
        else _with_refs(value, start)
        for key, value in schema.items()
    }


def answer_syntax(body: ChatBody, model: LoadedModel) -> ToolSyntax | None:
    """Return how calls are written in this chat's answer; None if there are none. Raises InvalidRequest."""
    if not body.tools or body.tool_choice == "none":
        return None
    if forced_tools(body):
        return FORCED
    if model.tool_syntax is None:
        raise InvalidRequest(
            "how this model writes tool calls is not known from its chat template; set --tool-call-parser, or"
            " tool_choice to required or to a function",
            param="tools",
        )
    return model.tool_syntax


def told_tools(body: ChatBody) -> list[dict[str, Any]] | None:
    """Return the tools as a chat template takes them."""
    if not body.tools or body.tool_choice == "none":
        return None
    return [
        {
            "type": "function",
            "function": {
                "name": one.function.name,
                "description": one.function.description or "",
                "parameters": one.function.parameters or {"type": "object", "properties": {}},
            },
        }
        for one in body.tools
    ]


def told_calls(message: ChatMessage, place: int) -> dict[str, Any]:
    """Return what a template is told of a message beside its text. Raises InvalidRequest for bad arguments."""
    told: dict[str, Any] = {}
    if message.tool_call_id is not None:
        told["tool_call_id"] = message.tool_call_id
    if message.reasoning_content is not None:
        told["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        told["tool_calls"] = [
            {
                "id": one.id,
                "type": "function",
                "function": {"name": one.function.name, "arguments": _object(one, place)},
            }
            for one in message.tool_calls
        ]
    return told


def _object(call: MessageToolCall, place: int) -> dict[str, Any]:
    try:
        value = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        field = f"messages[{place}].tool_calls"
        raise InvalidRequest(f"{field}: arguments must be a JSON object in a string", param=field)
    return value

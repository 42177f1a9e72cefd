"""The grammars that bodies ask for."""

from __future__ import annotations

import json
from typing import Any

import jsonschema

from tandem.api.openai import ChatBody
from tandem.api.parsing import parse
from tandem.api.structured import requested_grammar
from tandem.api.tools import tool_grammar

MESSAGES = [{"role": "user", "content": "a"}]


def chat(**fields: Any) -> ChatBody:
    return parse(json.dumps({"messages": MESSAGES} | fields).encode(), ChatBody)


def test_a_request_does_not_change_what_later_ones_ask_for() -> None:
    plain = chat(structured_outputs={"json_object": True})
    before = requested_grammar(plain)
    compact = chat(structured_outputs={"json_object": True, "disable_any_whitespace": True})
    assert requested_grammar(compact) != before
    assert requested_grammar(plain) == before


def tool(name: str, item: dict[str, Any]) -> dict[str, Any]:
    parameters = {"type": "object", "properties": {"item": {"$ref": "#/$defs/Item"}}, "$defs": {"Item": item}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_tools_may_have_definitions_of_one_name() -> None:
    body = chat(tools=[tool("a", {"type": "integer"}), tool("b", {"type": "string"})], tool_choice="required")
    grammar = tool_grammar(body)
    assert grammar is not None
    schema = json.loads(grammar.source)
    for name, good, bad in (("a", 1, "x"), ("b", "x", 1)):
        jsonschema.validate([{"name": name, "parameters": {"item": good}}], schema)
        assert not jsonschema.Draft202012Validator(schema).is_valid([{"name": name, "parameters": {"item": bad}}])
    assert body.tools is not None
    assert [list(one.function.parameters or {}) for one in body.tools] == [["type", "properties", "$defs"]] * 2

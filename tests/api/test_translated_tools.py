"""Tools, reasoning and structured answers over OpenAI's Responses and Anthropic's Messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import MODEL, Api, FakeBackend, deltas, running
from tests.api.test_answer_parts import CALL, QWEN, decoded, model_folder, prompt
from tests.api.test_translated import events, respond, write

CITY = {"type": "object"}
FUNCTION: dict[str, Any] = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
TOOL = {"name": "weather", "input_schema": CITY, "cache_control": {"type": "ephemeral"}}
ANSWER = ("<think>\nRome?", "</think>I look.", "\n", CALL[:60], CALL[60:])


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(FakeBackend(model_folder(folder, tmp_path_factory.mktemp("qwen"), QWEN))) as found:
        yield found


@pytest.fixture
def api(shared: Api) -> Api:
    shared.backend.reset()
    shared.backend.script = lambda request: deltas(*ANSWER)
    return shared


def test_the_official_client_reads_reasoning_text_and_calls(api: Api) -> None:
    found = api.client().responses.create(model=MODEL, input="hello", tools=[FUNCTION])  # type: ignore[list-item]
    reasoning, text, call = found.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "Rome?"
    assert found.output_text == "I look."
    assert text.type == "message"
    assert call.type == "function_call"
    assert (call.name, json.loads(call.arguments)) == ("weather", {"city": "Rome"})
    assert found.status == "completed"


def test_the_official_client_reads_a_stream_with_calls(api: Api) -> None:
    with api.client().responses.stream(model=MODEL, input="hello", tools=[FUNCTION]) as stream:  # type: ignore[list-item]
        kinds = [event.type.removeprefix("response.") for event in stream]
        final = stream.get_final_response()
    assert [kind for kind in kinds if not kind.endswith("delta")] == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done", "completed"),
    ]
    assert kinds.count("function_call_arguments.delta") == 2
    assert [one.type for one in final.output] == ["reasoning", "message", "function_call"]


def bare(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items without what is made anew for each answer."""
    return [{name: value for name, value in one.items() if name not in ("id", "call_id")} for one in items]


def test_a_stream_comes_to_what_the_whole_answer_is(api: Api) -> None:
    [*_, last] = events(respond(api, tools=[FUNCTION], stream=True))
    assert bare(last["response"]["output"]) == bare(respond(api, tools=[FUNCTION]).json["output"])
    blocks: list[dict[str, Any]] = []
    for event in events(write(api, tools=[TOOL], stream=True)):
        if event["type"] == "content_block_start":
            blocks.append(event["content_block"] | {"input": ""})
        if event["type"] == "content_block_delta":
            name = {"input_json_delta": "partial_json", "text_delta": "text", "thinking_delta": "thinking"}
            more = event["delta"][name[event["delta"]["type"]]]
            field = "input" if event["delta"]["type"] == "input_json_delta" else name[event["delta"]["type"]]
            blocks[event["index"]][field] += more
        if event["type"] == "message_delta":
            assert event["delta"]["stop_reason"] == "tool_use"
    whole = write(api, tools=[TOOL]).json
    assert [one["type"] for one in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["stop_reason"] == "tool_use"
    assert [one["type"] for one in blocks] == [one["type"] for one in whole["content"]]
    assert blocks[0]["thinking"] == whole["content"][0]["thinking"] == "Rome?"
    assert blocks[1]["text"] == whole["content"][1]["text"] == "I look."
    assert json.loads(blocks[2]["input"]) == whole["content"][2]["input"] == {"city": "Rome"}


def test_an_answer_of_the_responses_api_can_be_sent_back_with_the_result(api: Api) -> None:
    answered = respond(api, tools=[FUNCTION]).json["output"]
    result = {"type": "function_call_output", "call_id": answered[-1]["call_id"], "output": "sunny"}
    given = [{"role": "user", "content": "hello"}, *answered, result]
    assert respond(api, input=given, tools=[FUNCTION]).status == 200
    text = decoded(prompt(api))
    assert "call Rome" in text
    assert "Rome?</think>I look." in text
    assert "tool\n</think>sunny" in text


def test_an_answer_of_the_messages_api_can_be_sent_back_with_the_result(api: Api) -> None:
    answered = write(api, tools=[TOOL]).json["content"]
    result = {"type": "tool_result", "tool_use_id": answered[-1]["id"], "content": [{"type": "text", "text": "sunny"}]}
    given = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": answered},
        {"role": "user", "content": [result, {"type": "text", "text": "and now?"}]},
    ]
    assert write(api, messages=given, tools=[TOOL]).status == 200
    text = decoded(prompt(api))
    assert "call Rome" in text
    assert "Rome?</think>I look." in text
    assert text.index("tool\n</think>sunny") < text.index("and now?")


FORCED = '[{"name":"weather","parameters":{"city":"Rome"}}]'


@pytest.mark.parametrize(
    ("send", "fields"),
    [
        (respond, {"tools": [FUNCTION], "tool_choice": "required"}),
        (respond, {"tools": [FUNCTION], "tool_choice": {"type": "function", "name": "weather"}}),
        (write, {"tools": [TOOL], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}),
        (write, {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "weather"}}),
    ],
)
def test_a_call_that_must_be_made_has_a_grammar(api: Api, send: Any, fields: dict[str, Any]) -> None:
    api.backend.script = lambda request: deltas(FORCED)
    reply = send(api, **fields).json
    [item] = reply.get("output") or reply["content"]
    assert item["type"] in ("function_call", "tool_use")
    assert api.backend.requests[0].grammar is not None


def test_without_a_choice_of_calls_text_stays_text(api: Api) -> None:
    api.backend.script = lambda request: deltas(CALL)
    assert respond(api, tools=[FUNCTION], tool_choice="none").json["output"][0]["content"][0]["text"] == CALL
    assert write(api, tools=[TOOL], tool_choice={"type": "none"}).json["content"] == [{"type": "text", "text": CALL}]


@pytest.mark.parametrize("count", [1, 2])
def test_calls_beside_the_first_one_are_left_out_where_they_are_not_wanted(api: Api, count: int) -> None:
    api.backend.script = lambda request: deltas(CALL, "\n" + CALL)
    alone = count == 1
    assert len(respond(api, tools=[FUNCTION], parallel_tool_calls=not alone).json["output"]) == count
    choice = {"type": "auto", "disable_parallel_tool_use": alone}
    assert len(write(api, tools=[TOOL], tool_choice=choice).json["content"]) == count


@pytest.mark.parametrize(
    ("send", "fields"),
    [
        (respond, {"text": {"format": {"type": "json_schema", "name": "x", "schema": CITY, "strict": True}}}),
        (respond, {"text": {"format": {"type": "json_object"}, "verbosity": "low"}}),
        (write, {"output_config": {"format": {"type": "json_schema", "schema": CITY}}}),
    ],
)
def test_an_answer_may_have_a_schema(api: Api, send: Any, fields: dict[str, Any]) -> None:
    api.backend.script = lambda request: deltas('{"city": "Rome"}')
    assert send(api, **fields).status == 200
    grammar = api.backend.requests[0].grammar
    assert grammar is not None
    assert grammar.kind == "json_schema"


@pytest.mark.parametrize(
    ("send", "fields", "quick"),
    [
        (respond, {"reasoning": {"effort": "none"}}, True),
        (respond, {"reasoning": {"effort": "high", "summary": "auto"}}, False),
        (write, {"thinking": {"type": "disabled"}}, True),
        (write, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, False),
    ],
)
def test_the_template_is_told_whether_to_think(api: Api, send: Any, fields: dict[str, Any], quick: bool) -> None:
    assert send(api, **fields).status == 200
    assert ("quick" in decoded(prompt(api))) == quick


def test_tokens_of_a_conversation_are_counted_as_they_would_be_used(api: Api) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "tools": [TOOL], "system": "be brief"}
    counted = api.send("POST", "/v1/messages/count_tokens", body).json
    assert not api.backend.requests
    assert write(api, **body).status == 200
    assert counted == {"input_tokens": len(prompt(api))}
    refused = api.send("POST", "/v1/messages/count_tokens", body | {"messages": []})
    assert (refused.status, refused.json["type"]) == (400, "error")


def test_a_call_that_is_cut_is_not_complete(api: Api) -> None:
    api.backend.script = lambda request: deltas(CALL[:60], finish="length")
    found = respond(api, tools=[FUNCTION]).json
    assert (found["status"], found["output"][-1]["status"]) == ("incomplete", "incomplete")
    message = write(api, tools=[TOOL]).json
    assert (message["stop_reason"], message["content"][-1]["input"]) == ("max_tokens", {})

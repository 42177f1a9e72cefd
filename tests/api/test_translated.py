import json
from pathlib import Path
from typing import Any

import openai
import pytest

from tandem.api.api_keys import ApiKeys
from tandem.config_limits import LimitsSection
from tandem.errors import EngineFailed
from tests.api.conftest import END, MODEL, START, Api, FakeBackend, Reply, deltas, ids, running

HELLO = [{"role": "user", "content": "hello"}]
PROMPT = f"{START}user\nhello{END}\n{START}assistant\n"


def respond(api: Api, **body: Any) -> Reply:
    return api.send("POST", "/v1/responses", {"input": "hello"} | body)


def write(api: Api, **body: Any) -> Reply:
    return api.send("POST", "/v1/messages", {"model": MODEL, "max_tokens": 9, "messages": HELLO} | body)


def events(reply: Reply) -> list[dict[str, Any]]:
    """The events of a stream; each has its name twice."""
    assert reply.status == 200
    found = []
    for block in reply.body.decode().strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


# --- /v1/responses -------------------------------------------------------------------------------------------------


def test_the_official_client_reads_a_response(api: Api) -> None:
    found = api.client().responses.create(model=MODEL, input="hello", instructions="say it", max_output_tokens=9)
    assert (found.output_text, found.status, found.model) == ("hello world", "completed", MODEL)
    assert found.usage is not None
    assert found.usage.output_tokens == len(ids("hello") + ids(" world")) + 1
    assert found.usage.input_tokens_details.cached_tokens == 3
    assert api.backend.requests[0].token_ids == ids(f"{START}system\nsay it{END}\n{PROMPT}")
    assert api.backend.requests[0].sampling.max_tokens == 9


def test_the_official_client_reads_a_stream_of_a_response(api: Api) -> None:
    with api.client().responses.stream(model=MODEL, input=[{"role": "user", "content": "hello"}]) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert (kinds[0], kinds[-1]) == ("response.created", "response.completed")
    assert final.output_text == "hello world"
    assert api.backend.requests[0].token_ids == ids(PROMPT)


def test_a_stream_of_a_response_has_its_events_in_order(api: Api) -> None:
    api.backend.script = lambda request: deltas("hel", "lo", finish="length")
    found = events(respond(api, stream=True))
    assert [event["type"].removeprefix("response.") for event in found] == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta", "output_text.done"),
        *("content_part.done", "output_item.done", "incomplete"),
    ]
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert "".join(event["delta"] for event in found if "delta" in event) == "hello"
    whole = respond(api).json
    assert found[-1]["response"].keys() == whole.keys()
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_what_a_conversation_had_before_can_be_sent_back(api: Api) -> None:
    given = [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"role": "assistant", "id": "msg_1", "status": "completed", "content": [{"type": "output_text", "text": "b"}]},
        {"role": "user", "content": "hello"},
    ]
    assert respond(api, input=given).status == 200
    before = f"{START}user\na{END}\n{START}assistant\nb{END}\n"
    assert api.backend.requests[0].token_ids == ids(before + PROMPT)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"text": {"format": {"type": "xml"}}}, "text"),
        ({"text": {"colour": 1}}, "text"),
        ({"reasoning": {"effort": "much"}}, "effort"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"tool_choice": ""}, "tool_choice"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": []}, "input"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"role": "boss", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": 7}]}, "input[0].content"),
        ({"input": [7]}, "input[0]"),
        ({"max_output_tokens": -1}, "max_tokens"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_response_that_cannot_be_made_is_refused_by_name(api: Api, fields: dict[str, Any], param: str) -> None:
    reply = respond(api, **fields)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)
    assert not api.backend.requests


def test_what_asks_for_nothing_is_taken(api: Api) -> None:
    nothing: dict[str, Any] = {"tools": [], "store": True, "include": [], "metadata": {"a": "b"}, "reasoning": None}
    more = {
        "text": {"format": {"type": "text"}},
        "truncation": "disabled",
        "max_output_tokens": 4.0,
        "tool_choice": "auto",
    }
    assert respond(api, **nothing, **more).status == 200


# --- /v1/messages --------------------------------------------------------------------------------------------------


def test_a_message_has_anthropics_shape(api: Api) -> None:
    found = write(api, system=[{"type": "text", "text": "say it"}], temperature=0.5, top_k=5).json
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", MODEL)
    assert found["content"] == [{"type": "text", "text": "hello world"}]
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    prompt = ids(f"{START}system\nsay it{END}\n{PROMPT}")
    assert found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"] == len(prompt)
    sampling = api.backend.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (9, 0.5, 5)
    assert api.backend.requests[0].token_ids == prompt


def test_a_stream_of_a_message_has_its_events_in_order(api: Api) -> None:
    found = events(write(api, stream=True, stop_sequences=[" wor"]))
    assert [event["type"] for event in found] == [
        *("message_start", "content_block_start", "content_block_delta"),
        *("content_block_stop", "message_delta", "message_stop"),
    ]
    text = "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")
    assert text == "hello"
    delta = found[-2]
    assert delta["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": " wor"}
    assert delta["usage"]["output_tokens"] > 0


def test_the_end_says_whether_the_length_cut_it(api: Api) -> None:
    api.backend.script = lambda request: deltas("hello", finish="length")
    assert write(api).json["stop_reason"] == "max_tokens"


def test_a_message_of_the_assistant_at_the_end_is_gone_on_with(api: Api) -> None:
    write(api, messages=[*HELLO, {"role": "assistant", "content": "the qu"}])
    assert api.backend.requests[0].token_ids == ids(f"{PROMPT}the qu")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0.0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"temperature": 1.5}, "temperature"),
        ({"model": "claude"}, "model"),
        ({"n": 2}, "n"),
    ],
)
def test_a_message_that_cannot_be_made_is_refused_by_name(api: Api, fields: dict[str, Any], param: str) -> None:
    reply = write(api, **fields)
    assert reply.status in (400, 404)
    assert (reply.json["type"], reply.json["error"]["param"]) == ("error", param)


def test_what_is_refused_at_the_door_is_an_error_of_that_api_too(folder: Path) -> None:
    with running(FakeBackend(folder), limits=LimitsSection(max_body=1000)) as api:
        for path in ("/v1/messages", "/v1/responses"):
            reply = api.send("POST", path, {"input": "x" * 2000})
            assert (reply.status, reply.json["type"]) == (413, "error")


@pytest.mark.parametrize("send", [respond, write])
def test_an_error_in_a_stream_is_an_event_of_that_name(api: Api, send: Any) -> None:
    api.backend.script = lambda request: [*deltas("hello")[:1], EngineFailed("it broke")]
    *_, last = events(send(api, stream=True))
    assert (last["type"], last["error"]["code"]) == ("error", "engine_failed")


def test_a_key_may_come_as_anthropics_clients_send_it(folder: Path) -> None:
    with running(FakeBackend(folder), keys=ApiKeys("secret")) as api:
        body = {"model": MODEL, "max_tokens": 9, "messages": HELLO}
        for headers, status in (({}, 401), ({"x-api-key": "other"}, 401), ({"x-api-key": "secret"}, 200)):
            assert api.send("POST", "/v1/messages", body, headers).status == status
        with pytest.raises(openai.AuthenticationError):
            api.client("other").responses.create(model=MODEL, input="x")


def test_a_translated_request_is_logged_and_with_its_user_where_it_names_one(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert respond(api, user="ann").status == 200
        assert write(api).status == 200
    logged = [one.message.split(": ", 1)[1] for one in caplog.records if one.message.startswith("request ")]
    counted = f"1 sequences, {len(ids(PROMPT))} prompt tokens"
    assert logged == [f"responses, {counted}, user 'ann'", f"messages, {counted}"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_says_back_what_was_asked_of_tools(api: Api, stream: bool) -> None:
    asked = {"parallel_tool_calls": False, "tool_choice": "none", "max_tool_calls": 3}
    reply = respond(api, **asked, stream=stream)
    found = events(reply)[-1]["response"] if stream else reply.json
    assert {name: found[name] for name in asked} == asked
    default = respond(api).json
    assert {name: default[name] for name in asked} == {
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "max_tool_calls": None,
    }
    nulls = respond(api, **dict.fromkeys(asked)).json
    assert {name: nulls[name] for name in asked} == {name: default[name] for name in asked}

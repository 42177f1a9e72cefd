"""Anthropic's own client: messages, thinking, tools, streams, counted tokens, errors."""

from __future__ import annotations

from typing import Any

import pytest
from anthropic import Anthropic, AuthenticationError, BadRequestError, NotFoundError

from tests.clients.conftest import KEYS, MODEL
from tests.clients.scripted_model import ANSWER, CALL_TEXT, GREETING, THOUGHT, WEATHER_BERN, WEATHER_ROME
from tests.support.deployment import Deployment

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Rome", "Bern"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def says(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


@pytest.fixture
def client(scripted: Deployment) -> Anthropic:
    return Anthropic(base_url=scripted.http.url, api_key=KEYS[0], max_retries=0)


def test_thinking_is_apart_from_the_answer(client: Anthropic) -> None:
    message = client.messages.create(model=MODEL, max_tokens=100, system="Be brief.", messages=says("Hello"))
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert message.content[0].thinking.strip() == THOUGHT
    assert message.content[1].text.strip() == GREETING
    assert (message.stop_reason, message.role) == ("end_turn", "assistant")
    assert message.usage.input_tokens > 0


def test_a_stream_adds_up_to_the_message(client: Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=100, messages=says("Hello")) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text.strip() == GREETING
    assert [block.type for block in message.content] == ["thinking", "text"]


def test_a_tool_is_called_and_its_answer_goes_back(client: Anthropic) -> None:
    question = says("How is it there?")
    message = client.messages.create(model=MODEL, max_tokens=100, tools=[WEATHER], messages=question)
    text, call = message.content
    assert (message.stop_reason, text.text.strip(), call.input) == ("tool_use", CALL_TEXT, WEATHER_ROME["arguments"])
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "21 degrees"}]}
    history = [*question, {"role": "assistant", "content": message.content}, {"role": "user", "content": [result]}]
    answer = client.messages.create(model=MODEL, max_tokens=100, tools=[WEATHER], messages=history)
    assert [block.text for block in answer.content] == [ANSWER]


def test_several_tools_are_called_in_a_stream(client: Anthropic) -> None:
    with client.messages.stream(model=MODEL, max_tokens=100, tools=[WEATHER], messages=says("both?")) as stream:
        message = stream.get_final_message()
    calls = [block for block in message.content if block.type == "tool_use"]
    assert [call.input for call in calls] == [WEATHER_ROME["arguments"], WEATHER_BERN["arguments"]]
    assert len({call.id for call in calls}) == 2


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_that_must_be_made_is_made(client: Anthropic, choice: Any) -> None:
    message = client.messages.create(
        model=MODEL, max_tokens=100, tools=[WEATHER], tool_choice=choice, messages=says("Hello")
    )
    first = message.content[0]  # others may follow, the last one cut off by max_tokens
    assert (first.type, first.name) == ("tool_use", "get_weather")
    assert first.input["city"] in ("Rome", "Bern")


def test_tokens_are_counted(client: Anthropic) -> None:
    short, long = (client.messages.count_tokens(model=MODEL, messages=says(text)) for text in ("Hi", "Hi there"))
    assert long.input_tokens - short.input_tokens == len(" there")


def test_errors_have_their_types(client: Anthropic, scripted: Deployment) -> None:
    with pytest.raises(AuthenticationError):
        Anthropic(base_url=scripted.http.url, api_key="wrong").messages.create(
            model=MODEL, max_tokens=4, messages=says("Hello")
        )
    with pytest.raises(NotFoundError, match="nothing"):
        client.messages.create(model="nothing", max_tokens=4, messages=says("Hello"))
    with pytest.raises(BadRequestError, match="temperature"):
        client.messages.create(model=MODEL, max_tokens=4, messages=says("Hello"), extra_body={"temperature": -1})

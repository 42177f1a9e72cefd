"""OpenAI's own client: chats, streams, tools, structured answers, and its typed errors."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam
from pydantic import BaseModel, Field

from tests.clients.conftest import KEYS, MAX_CLIENT_REQUESTS, MODEL
from tests.clients.scripted_model import ANSWER, CALL_TEXT, GREETING, PLAIN, THOUGHT
from tests.support.deployment import Deployment

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Hello"}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Bern"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class Trip(BaseModel):
    city: Literal["Rome", "Bern"]
    days: int = Field(ge=1, le=9)


@pytest.fixture
def client(url: str) -> OpenAI:
    return OpenAI(base_url=url, api_key=KEYS[0], max_retries=0, timeout=60)


def test_models_are_listed(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_answers_to_questions_are_right(demo: Deployment) -> None:
    client = OpenAI(base_url=f"{demo.http.url}/v1", api_key="none is needed")
    chat = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Reverse: krqzm"}], temperature=0
    )
    assert chat.choices[0].message.content == "mzqrk"
    assert (chat.choices[0].finish_reason, chat.object) == ("stop", "chat.completion")
    assert chat.usage is not None
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    assert chat.model_extra is not None
    assert chat.model_extra["tandem"]["disaggregated"]


def test_reasoning_is_apart_from_the_answer(client: OpenAI) -> None:
    message = client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message
    assert message.content == GREETING
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"].strip() == THOUGHT


def test_reasoning_is_apart_in_a_stream_too(client: OpenAI) -> None:
    thought = said = ""
    usages = []
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    ) as stream:
        for chunk in stream:
            usages += [chunk.usage] if chunk.usage is not None else []
            for choice in chunk.choices:
                said += choice.delta.content or ""
                thought += (choice.delta.model_extra or {}).get("reasoning_content") or ""
    assert (said, thought.strip(), len(usages)) == (GREETING, THOUGHT, 1)


def test_no_effort_is_no_reasoning(client: OpenAI) -> None:
    message = client.chat.completions.create(model=MODEL, messages=HELLO, reasoning_effort="none").choices[0].message
    assert message.content == PLAIN
    assert "reasoning_content" not in (message.model_extra or {})


def test_a_tool_is_called_and_its_answer_goes_back(client: OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "How is the weather in Rome?"}]
    first = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0]
    assert (first.finish_reason, first.message.content) == ("tool_calls", f"{CALL_TEXT}\n")
    [call] = first.message.tool_calls or []
    assert call.type == "function"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Rome"})
    messages += [first.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"}]
    last = client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0]
    assert (last.message.content, last.finish_reason) == (ANSWER, "stop")


def test_several_tools_are_called_in_a_stream(client: OpenAI) -> None:
    """The helper that joins the pieces and says when a call's arguments are complete."""
    done = []
    with client.chat.completions.stream(
        model=MODEL, messages=[{"role": "user", "content": "Rome and Bern, both"}], tools=[WEATHER]
    ) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.done":
                done.append((event.index, event.name, json.loads(event.arguments)))
        final = stream.get_final_completion()
    assert done == [(0, "get_weather", {"city": "Rome"}), (1, "get_weather", {"city": "Bern"})]
    assert final.choices[0].finish_reason == "tool_calls"
    assert len({call.id for call in final.choices[0].message.tool_calls or []}) == 2


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_a_call_that_must_be_made_is_made(client: OpenAI, choice: Any) -> None:
    message = client.chat.completions.create(
        model=MODEL, messages=HELLO, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False
    ).choices[0]
    [call] = message.message.tool_calls or []
    assert call.type == "function"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Bern")
    assert message.message.content is None


def test_an_answer_is_parsed_into_a_type(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=Trip, n=3)
    for choice in parsed.choices:
        assert isinstance(choice.message.parsed, Trip), choice
        assert (choice.message.refusal, choice.finish_reason) == (None, "stop")


def test_a_stream_is_parsed_into_a_type(client: OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HELLO, response_format=Trip) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Trip)
    assert "content.done" in kinds


def test_tools_of_types_are_parsed(client: OpenAI) -> None:
    """`pydantic_function_tool` asks for `strict`, with which the helper parses the arguments."""
    tool = openai.pydantic_function_tool(Trip)
    answer = client.chat.completions.parse(model=MODEL, messages=HELLO, tools=[tool], tool_choice="required")
    for call in answer.choices[0].message.tool_calls or []:
        assert isinstance(call.function.parsed_arguments, Trip)
    assert answer.choices[0].message.tool_calls


def test_logprobs_and_several_choices_have_their_types(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=HELLO, n=2, logprobs=True, top_logprobs=2, temperature=0, max_completion_tokens=3, seed=1
    )
    for choice in chat.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2, 2, 2]
        assert choice.finish_reason == "length"
    text = client.completions.create(model=MODEL, prompt="Hi", max_tokens=4, logprobs=2, echo=True, temperature=0)
    assert text.choices[0].logprobs is not None
    assert text.choices[0].logprobs.token_logprobs is not None
    assert len(text.choices[0].logprobs.token_logprobs) >= 2


def test_errors_have_their_types(client: OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=1000)
    assert (bad.value.param, bad.value.code, bad.value.type) == (
        "temperature",
        "invalid_request",
        "invalid_request_error",
    )
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=HELLO)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.AuthenticationError) as stranger:
        OpenAI(base_url=url, api_key="wrong", max_retries=0).chat.completions.create(model=MODEL, messages=HELLO)
    assert stranger.value.code == "invalid_api_key"


def test_embeddings_are_refused_for_a_reason(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model=MODEL, input="Hello")


def endless(client: OpenAI, **options: Any) -> Any:
    """A stream that goes on for as long as the model can."""
    return client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, extra_body={"ignore_eos": True}, **options
    )


def test_too_many_requests_of_one_key_are_refused_and_no_others(client: OpenAI, url: str) -> None:
    streams = [endless(client) for _ in range(MAX_CLIENT_REQUESTS)]
    with pytest.raises(openai.RateLimitError) as refused:
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert (refused.value.code, refused.value.response.headers["retry-after"]) == ("rate_limit_exceeded", "1")
    other = OpenAI(base_url=url, api_key=KEYS[1])
    assert other.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content == GREETING
    for stream in streams:
        stream.close()
    patient = client.with_options(max_retries=5)  # its own wait and second try
    assert patient.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content == GREETING


def test_a_client_that_waits_no_longer_is_gone(client: OpenAI, scripted: Deployment) -> None:
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model=MODEL, messages=HELLO, timeout=0.5, extra_body={"ignore_eos": True})
    assert client.chat.completions.create(model=MODEL, messages=HELLO).choices[0].message.content == GREETING
    while scripted.http.get("/load").json["server_load"]:
        pass  # ends with the test's own time limit

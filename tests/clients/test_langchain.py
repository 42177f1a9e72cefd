"""LangChain's chat models: streams, tools by `bind_tools`, and `with_structured_output` in each of its ways."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from openai import NotFoundError
from pydantic import BaseModel, Field

from tests.clients.conftest import KEYS, MODEL
from tests.clients.scripted_model import ANSWER, GREETING
from tests.support.deployment import Deployment


class Trip(BaseModel):
    """A trip to a city."""

    city: Literal["Rome", "Bern"]
    days: int = Field(ge=1, le=9)


def weather(city: Literal["Rome", "Bern"]) -> str:
    """The weather of a city."""
    return f"21 degrees in {city}"


@pytest.fixture
def chat(url: str) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=url, api_key=KEYS[0], max_retries=0)


def test_a_chat_answers_whole_and_as_a_stream(chat: ChatOpenAI) -> None:
    whole = chat.invoke("Hello")
    assert whole.content == GREETING
    assert isinstance(whole, AIMessage)
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(str(piece.content) for piece in chat.stream("Hello")) == GREETING
    assert [answer.content for answer in chat.batch(["Hello", "Hi"])] == [GREETING] * 2


async def _said(chat: ChatOpenAI) -> str:
    return "".join([str(piece.content) async for piece in chat.astream("Hello")])


def test_a_chat_answers_asynchronously(chat: ChatOpenAI) -> None:
    import asyncio

    assert asyncio.run(_said(chat)) == GREETING


def test_a_tool_is_called_and_its_answer_goes_back(chat: ChatOpenAI) -> None:
    able = chat.bind_tools([tool("get_weather")(weather)])
    messages: list[BaseMessage] = [HumanMessage("How is the weather in Rome?")]
    called = able.invoke(messages)
    [call] = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Rome"})
    messages += [called, ToolMessage(weather(**call["args"]), tool_call_id=call["id"])]
    assert able.invoke(messages).content == ANSWER


def test_a_tool_is_called_in_a_stream(chat: ChatOpenAI) -> None:
    able = chat.bind_tools([tool("get_weather")(weather)])
    joined: Any = None
    for piece in able.stream("Rome and Bern, both"):
        joined = piece if joined is None else joined + piece
    assert [call["args"] for call in joined.tool_calls] == [{"city": "Rome"}, {"city": "Bern"}]


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_a_call_that_must_be_made_is_made(chat: ChatOpenAI, choice: str) -> None:
    able = chat.bind_tools([tool("get_weather")(weather)], tool_choice=choice, parallel_tool_calls=False)
    [call] = able.invoke("Hello").tool_calls
    assert call["name"] == "get_weather"
    assert call["args"]["city"] in ("Rome", "Bern")


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output_is_of_the_type(chat: ChatOpenAI, method: Any, strict: bool | None) -> None:
    trip = chat.with_structured_output(Trip, method=method, strict=strict).invoke("Where to?")
    assert isinstance(trip, Trip)


def test_structured_output_comes_in_a_stream(chat: ChatOpenAI) -> None:
    *_, last = chat.with_structured_output(Trip, method="json_schema").stream("Where to?")
    assert isinstance(last, Trip)


def test_a_plain_schema_is_taken_too(chat: ChatOpenAI) -> None:
    schema = Trip.model_json_schema()
    trip = chat.with_structured_output(schema, method="json_schema").invoke("Where to?")
    Trip.model_validate(trip)


def test_completions_answer(url: str) -> None:
    model = OpenAI(model=MODEL, base_url=url, api_key=KEYS[0], max_tokens=4)
    assert isinstance(model.invoke("Hello"), str)


def test_embeddings_are_refused_for_a_reason(url: str) -> None:
    embeddings = OpenAIEmbeddings(model=MODEL, base_url=url, api_key=KEYS[0], check_embedding_ctx_length=False)
    with pytest.raises(NotFoundError, match="embeddings"):
        embeddings.embed_query("Hello")


def test_anthropics_way_of_it_calls_tools_too(scripted: Deployment) -> None:
    chat = ChatAnthropic(model=MODEL, base_url=scripted.http.url, api_key=KEYS[0], max_retries=0, max_tokens=100)

    answer = chat.bind_tools([tool("get_weather")(weather)]).invoke("How is it there?")
    assert [(call["name"], call["args"]) for call in answer.tool_calls] == [("get_weather", {"city": "Rome"})]

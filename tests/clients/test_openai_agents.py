"""openai-agents: agents with tools and output types, over responses and over chat completions."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import pytest
from agents import (
    Agent,
    AgentOutputSchema,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

from tests.clients.conftest import KEYS, MODEL
from tests.clients.scripted_model import ANSWER, GREETING


class Trip(BaseModel):
    city: Literal["Rome", "Bern"]


@pytest.fixture(params=[OpenAIResponsesModel, OpenAIChatCompletionsModel])
def model(request: pytest.FixtureRequest, url: str) -> Any:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=url, api_key=KEYS[0], max_retries=0)
    return request.param(MODEL, openai_client=client)


def test_an_agent_answers(model: Any) -> None:
    result = Runner.run_sync(Agent("one", instructions="Be brief.", model=model), "Hello")
    assert result.final_output.strip() == GREETING


def test_an_agent_answers_as_a_stream(model: Any) -> None:
    async def run() -> str:
        result = Runner.run_streamed(Agent("one", model=model), "Hello")
        kinds = [event.type async for event in result.stream_events()]
        assert "raw_response_event" in kinds
        return str(result.final_output)

    assert asyncio.run(run()).strip() == GREETING


@pytest.mark.parametrize("streamed", [False, True])
def test_an_agent_calls_its_tool(model: Any, streamed: bool) -> None:
    asked = []

    def get_weather(city: Literal["Rome", "Bern"]) -> str:
        """The weather of a city."""
        asked.append(city)
        return f"21 degrees in {city}"

    agent = Agent("one", model=model, tools=[function_tool(get_weather)])

    async def run() -> Any:
        if not streamed:
            return (await Runner.run(agent, "How is it there?")).final_output
        result = Runner.run_streamed(agent, "How is it there?")
        async for _ in result.stream_events():
            pass
        return result.final_output

    assert asyncio.run(run()) == ANSWER
    assert asked == ["Rome"]


def test_output_is_of_the_type(model: Any) -> None:
    agent = Agent("one", model=model, output_type=AgentOutputSchema(Trip), model_settings=ModelSettings(max_tokens=60))
    assert isinstance(Runner.run_sync(agent, "Where to?").final_output, Trip)

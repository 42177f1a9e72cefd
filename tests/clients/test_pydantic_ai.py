"""pydantic-ai: agents with tools, and output types by tool, by schema and as text."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelHTTPError, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.conftest import KEYS, MODEL
from tests.clients.scripted_model import ANSWER, GREETING, THOUGHT


class Trip(BaseModel):
    city: Literal["Rome", "Bern"]
    days: int = Field(ge=1, le=9)


@pytest.fixture
def model(url: str) -> OpenAIChatModel:
    return OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key=KEYS[0]))


def test_an_agent_answers(model: OpenAIChatModel) -> None:
    result = Agent(model, system_prompt="Be brief.").run_sync("Hello")
    assert result.output == GREETING
    thoughts = [
        part.content for message in result.new_messages() for part in message.parts if part.part_kind == "thinking"
    ]
    assert [thought.strip() for thought in thoughts] == [THOUGHT]
    assert result.usage.output_tokens > 0


async def _streamed(agent: Any) -> str:
    async with agent.run_stream("Hello") as result:
        return "".join([piece async for piece in result.stream_text(delta=True)])


def test_an_agent_answers_as_a_stream(model: OpenAIChatModel) -> None:
    import asyncio

    assert asyncio.run(_streamed(Agent(model))) == GREETING


def test_an_agent_calls_its_tool(model: OpenAIChatModel) -> None:
    asked = []

    def get_weather(city: Literal["Rome", "Bern"]) -> str:
        """The weather of a city."""
        asked.append(city)
        return f"21 degrees in {city}"

    assert Agent(model, tools=[get_weather]).run_sync("How is it there?").output == ANSWER
    assert asked == ["Rome"]


@pytest.mark.parametrize("wrapped", [Trip, ToolOutput(Trip), NativeOutput(Trip), NativeOutput(Trip, strict=True)])
def test_output_is_of_the_type(model: OpenAIChatModel, wrapped: Any) -> None:
    assert isinstance(Agent(model, output_type=wrapped).run_sync("Where to?").output, Trip)


def test_errors_have_their_type(url: str) -> None:
    stranger = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=url, api_key="wrong"))
    with pytest.raises(ModelHTTPError) as refused:
        Agent(stranger).run_sync("Hello")
    assert refused.value.status_code == 401

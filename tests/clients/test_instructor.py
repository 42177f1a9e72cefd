"""instructor: types out of an answer, by tools and by JSON, whole and in pieces."""

from __future__ import annotations

from typing import Any, Literal

import instructor
import pytest
from instructor import Mode
from openai import OpenAI
from pydantic import BaseModel, Field

from tests.clients.conftest import KEYS, MODEL


class Trip(BaseModel):
    city: Literal["Rome", "Bern"]
    days: int = Field(ge=1, le=9)


def client(url: str, mode: Mode) -> Any:
    return instructor.from_openai(OpenAI(base_url=url, api_key=KEYS[0], max_retries=0), mode=mode)


MESSAGES = [{"role": "user", "content": "Where to?"}]


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA])
def test_an_answer_is_of_the_type(url: str, mode: Mode) -> None:
    trip = client(url, mode).chat.completions.create(model=MODEL, messages=MESSAGES, response_model=Trip, max_retries=0)
    assert isinstance(trip, Trip)


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.JSON_SCHEMA])
def test_an_answer_comes_in_pieces(url: str, mode: Mode) -> None:
    pieces = list(
        client(url, mode).chat.completions.create_partial(model=MODEL, messages=MESSAGES, response_model=Trip)
    )
    Trip.model_validate(pieces[-1].model_dump())

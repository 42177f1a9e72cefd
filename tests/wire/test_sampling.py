"""Each sampling parameter at the ends of its range and beyond, on each way in."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from tandem.api.openai import GenerateBody
from tandem.api.parsing import sampling_params
from tandem.errors import InvalidRequest, WireError
from tandem.wire.codec import Codec
from tandem.wire.messages import Generate, ToEngine
from tandem.wire.sampling import SamplingParams

MOST = 2**31 - 1
INSIDE: list[dict[str, Any]] = [
    {"max_tokens": 1},
    {"max_tokens": MOST},
    {"min_tokens": 0},
    {"min_tokens": MOST, "max_tokens": MOST},
    {"temperature": 0.0},
    {"temperature": 5e-324},
    {"temperature": 100.0},
    {"top_p": 5e-324},
    {"top_p": 1.0},
    {"top_k": 0},
    {"top_k": MOST},
    {"min_p": 0.0},
    {"min_p": 5e-324},
    {"min_p": 1.0},
    {"repetition_penalty": 0.01},
    {"repetition_penalty": 100.0},
    {"presence_penalty": -2.0},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"frequency_penalty": 2.0},
    {"seed": 0},
    {"seed": 2**63 - 1},
    {"logprobs": 0},
    {"logprobs": 20},
    {"logit_bias": {0: -100.0, MOST: 100.0}},
    {"logit_bias": dict.fromkeys(range(1024), 1.0)},
    {"stop_token_ids": [0, MOST]},
    {"stop_token_ids": list(range(128))},
]
OUTSIDE: list[dict[str, Any]] = [
    {"max_tokens": 0},
    {"max_tokens": MOST + 1},
    {"min_tokens": -1},
    {"min_tokens": MOST + 1},
    {"temperature": -5e-324},
    {"temperature": math.nextafter(100.0, math.inf)},
    {"top_p": 0.0},
    {"top_p": math.nextafter(1.0, 2.0)},
    {"top_k": -1},
    {"top_k": MOST + 1},
    {"min_p": -5e-324},
    {"min_p": math.nextafter(1.0, 2.0)},
    {"repetition_penalty": 1e-39},
    {"repetition_penalty": 0.0},
    {"repetition_penalty": math.nextafter(0.01, 0.0)},
    {"repetition_penalty": math.nextafter(100.0, math.inf)},
    {"presence_penalty": math.nextafter(-2.0, -3.0)},
    {"presence_penalty": math.nextafter(2.0, 3.0)},
    {"frequency_penalty": math.nextafter(-2.0, -3.0)},
    {"frequency_penalty": math.nextafter(2.0, 3.0)},
    {"seed": -1},
    {"seed": 2**63},
    {"logprobs": -1},
    {"logprobs": 21},
    {"logit_bias": {0: math.nextafter(100.0, math.inf)}},
    {"logit_bias": {0: math.nan}},
    {"logit_bias": {-1: 1.0}},
    {"logit_bias": {MOST + 1: 1.0}},
    {"logit_bias": dict.fromkeys(range(1025), 1.0)},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [MOST + 1]},
    {"stop_token_ids": list(range(129))},
    *(
        {name: value}
        for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
        for value in (math.nan, math.inf, -math.inf)
    ),
]
NOT_IN_BODIES = ("max_tokens", "seed", "logprobs")
"""The API finds out max_tokens itself, takes any seed modulo 2**63, and has ranges of its own for logprobs."""


def shown(params: dict[str, Any]) -> str:
    return str(params)[:60]


def received(params: dict[str, Any]) -> SamplingParams:
    """As an engine decodes it from any router."""
    message = Generate("r", [1], 1, SamplingParams(**params), 1.0)
    decoded = Codec[ToEngine](ToEngine).decode(msgspec.msgpack.encode(message))
    assert isinstance(decoded, Generate)
    return decoded.sampling


def asked_for(params: dict[str, Any]) -> SamplingParams:
    """As a client asks for it."""
    given = {name: value for name, value in params.items() if name not in NOT_IN_BODIES}
    return sampling_params(GenerateBody(**given), params.get("max_tokens", 16), params.get("logprobs"))


@pytest.mark.parametrize("params", INSIDE, ids=shown)
def test_the_ends_of_a_range_are_taken_on_every_way_in(params: dict[str, Any]) -> None:
    expected = SamplingParams(**params)
    expected.check()
    assert received(params) == expected
    if "seed" not in params:
        assert msgspec.structs.replace(asked_for(params), seed=0) == expected


@pytest.mark.parametrize("params", OUTSIDE, ids=shown)
def test_what_is_beyond_a_range_is_refused_on_every_way_in(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        SamplingParams(**params).check()
    if params not in ({"seed": -1}, {"seed": 2**63}, {"top_k": -1}):  # which bodies have another meaning for
        with pytest.raises(InvalidRequest):
            asked_for(params)
    with pytest.raises(WireError):
        received(params)


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    SamplingParams(max_tokens=3, min_tokens=3).check()
    with pytest.raises(InvalidRequest, match="min_tokens is 4, but at most 3"):
        SamplingParams(max_tokens=3, min_tokens=4).check()

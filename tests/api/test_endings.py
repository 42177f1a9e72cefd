"""Requests end when something goes wrong, or the client goes away."""

import json
from typing import Any

import openai
import pytest

from tandem.api.backend import TokenDelta
from tandem.errors import EngineFailed, InvalidRequest, Overloaded, RequestError, TimedOut, Unavailable
from tests.api.conftest import HANG, MODEL, Api, deltas, details, ids

SAID = TokenDelta(ids("hello"), details=details())
KINDS = [
    (Overloaded("full", retry_after=7), 503, "overloaded", "7"),
    (Unavailable("no decode engine"), 503, "unavailable", "1"),
    (TimedOut("too late"), 504, "timed_out", None),
    (EngineFailed("gone"), 500, "engine_failed", None),
    (InvalidRequest("bad", param="x"), 400, "invalid_request", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "code", "retry"), KINDS)
def test_an_error_before_the_first_token_has_its_http_status_also_in_a_stream(
    api: Api, stream: bool, error: RequestError, status: int, code: str, retry: str | None
) -> None:
    api.backend.script = lambda request: [error]
    reply = api.complete(stream=stream)
    assert (reply.status, reply.error["code"], reply.headers.get("retry-after")) == (status, code, retry)
    assert (reply.error["message"], reply.error["param"]) == (str(error), error.param)


def test_an_error_in_mid_stream_is_one_event_and_the_end(api: Api) -> None:
    api.backend.script = lambda request: [SAID, EngineFailed("gone")]
    reply = api.complete(stream=True)
    assert reply.status == 200
    assert [event["choices"][0]["text"] for event in reply.events[:-1]] == ["hello"]
    assert reply.events[-1]["error"]["message"] == "gone"


def test_the_official_client_raises_an_error_in_mid_stream(api: Api) -> None:
    api.backend.script = lambda request: [SAID, EngineFailed("gone")]
    with pytest.raises(openai.APIError, match="gone"):
        list(api.client().completions.create(model=MODEL, prompt="x", stream=True))


def test_one_failing_choice_fails_the_request_and_aborts_the_others(api: Api) -> None:
    api.backend.script = lambda request: [TimedOut("late")] if request.request_id.endswith("-1") else [SAID, HANG]
    assert api.complete(n=3).status == 504
    assert {request_id[-2:] for request_id in api.backend.aborted} <= {"-0", "-2"}
    assert len(api.backend.aborted) == len(api.backend.requests) - 1


def test_a_bug_is_a_500_that_tells_no_secrets(api: Api) -> None:
    api.backend.script = lambda request: [ValueError("secret")]
    reply = api.complete()
    assert (reply.status, reply.error["code"]) == (500, "internal_error")
    assert "secret" not in reply.body.decode()


def test_an_engine_that_falls_silent_without_an_end_is_an_error(api: Api) -> None:
    api.backend.script = lambda request: [SAID]
    assert (api.complete().status, api.complete().error["code"]) == (500, "engine_failed")


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 2}])
@pytest.mark.parametrize("steps", [[HANG], [SAID, HANG]])
def test_a_client_that_goes_away_aborts_its_request(api: Api, fields: dict[str, Any], steps: list[Any]) -> None:
    api.backend.script = lambda request: steps
    connection = api.connect()
    connection.request("POST", "/v1/completions", json.dumps({"prompt": "hello", **fields}))
    assert api.backend.hanging.wait(10)
    connection.close()
    assert api.backend.closed.wait(10)
    assert api.backend.aborted


def test_a_stream_that_is_closed_by_the_official_client_is_aborted(api: Api) -> None:
    api.backend.script = lambda request: [SAID, HANG]
    with api.client().completions.create(model=MODEL, prompt="x", stream=True) as stream:
        assert next(iter(stream)).choices[0].text == "hello"
    assert api.backend.closed.wait(10)
    assert api.backend.aborted == [api.backend.requests[0].request_id]


def test_a_request_that_ended_by_itself_is_not_aborted(api: Api) -> None:
    api.backend.script = lambda request: deltas("hello")
    assert api.complete(stream=True).events[-1] == "[DONE]"
    assert api.backend.aborted == []

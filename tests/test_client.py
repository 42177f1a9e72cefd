"""The client reads streams however they are cut, and turns everything that goes wrong into a typed error."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web

from tandem.client import Choice, Client, Response, ServerSentEvents, TimedCompletion, Usage
from tandem.errors import EngineFailed, InvalidRequest, RequestError, Unavailable

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

EVENTS = (
    b'data: {"choices": [{"index": 0, "text": "he", "token_ids": [1]}], "usage": null}\n\n',
    b': a comment\r\ndata: {"choices": [{"index": 0, "text": "", "token_ids": [2]}]}\r\n\r\n',
    b'data:{"choices": [{"index": 0, "text": "y", "token_ids": [3, 4], "finish_reason": "length"}]}\n\n',
    b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}\n\n',
    b"data: [DONE]\n\n",
)


def streaming(*parts: bytes) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        return response

    return handle


def saying(status: int, body: str) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text=body, content_type="application/json")

    return handle


def completed(handle: Handler) -> TimedCompletion:
    """What a client gets from a server that answers so."""

    async def complete() -> TimedCompletion:
        app = web.Application()
        app.router.add_post("/v1/completions", handle)
        async for url in running(app):
            async with Client(url + "/v1") as client:
                return await client.complete("/v1/completions", {"prompt": "x"})
        raise AssertionError("no server")

    return asyncio.run(complete())


async def running(app: web.Application) -> AsyncIterator[str]:
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()


def test_events_are_found_however_the_bytes_are_cut() -> None:
    whole = b"".join(EVENTS)
    at_once = ServerSentEvents().feed(whole)
    assert len(at_once) == 5
    for size in range(1, 60):
        events = ServerSentEvents()
        cut = [one for at in range(0, len(whole), size) for one in events.feed(whole[at : at + size])]
        assert cut == at_once


def test_a_stream_becomes_a_completion_with_its_times() -> None:
    completion = completed(streaming(*EVENTS))
    assert completion.text == "hey"
    assert completion.token_ids == [1, 2, 3, 4]
    assert completion.finish_reason == "length"
    assert completion.usage == Usage(5, 4)
    assert completion.output_tokens == 4
    assert len(completion.arrivals) == 3
    assert len(completion.gaps) == 2
    assert completion.sent <= completion.arrivals[0] <= completion.arrivals[-1] <= completion.ended


def test_an_event_without_token_or_text_is_no_arrival() -> None:
    completion = TimedCompletion(sent=10.0)
    completion.add(Response([Choice()]), 11.0)
    completion.add(Response([Choice(text="a")]), 12.5)
    completion.add(Response([Choice(finish_reason="stop")]), 13.0)
    assert completion.arrivals == [12.5]
    assert completion.ttft == 2.5
    assert completion.itl == 0.0
    assert completion.finish_reason == "stop"


def test_an_error_amid_a_stream_is_raised() -> None:
    error = b'data: {"error": {"message": "an engine was lost", "type": "server_error", "code": "engine_failed"}}\n\n'
    with pytest.raises(EngineFailed, match="an engine was lost"):
        completed(streaming(EVENTS[0], error))


def test_a_stream_without_done_is_an_error() -> None:
    with pytest.raises(EngineFailed, match="ended before it was complete"):
        completed(streaming(*EVENTS[:-1]))


def test_an_event_that_is_not_json_is_an_error() -> None:
    with pytest.raises(EngineFailed, match="cannot be read"):
        completed(streaming(b"data: {no\n\n"))


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, '"context_length_exceeded"', InvalidRequest),
        (404, "null", InvalidRequest),
        (503, '"overloaded"', RequestError),
        (503, "null", Unavailable),
        (500, "17", RequestError),
    ],
)
def test_the_error_of_a_server_is_a_typed_one(status: int, code: str, expected: type[RequestError]) -> None:
    with pytest.raises(expected, match="too long"):
        completed(saying(status, f'{{"error": {{"message": "too long", "code": {code}}}}}'))


def test_an_error_that_is_not_openais_is_shown_as_it_came() -> None:
    with pytest.raises(RequestError, match="502: bad gateway"):
        completed(saying(502, "bad gateway"))


def test_nobody_there_is_unavailable_and_names_the_url() -> None:
    async def ask(url: str) -> None:
        async with Client(url) as client:
            await client.model()

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unavailable, match=url):
            asyncio.run(ask(url))

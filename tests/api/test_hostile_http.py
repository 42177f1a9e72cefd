"""What clients do to a server on its real socket: without end, too slowly, too often, and without listening."""

import asyncio
import http.client
import json
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tandem.api.api_keys import ApiKeys
from tandem.api.app import create_app
from tandem.api.backend import TokenDelta
from tandem.api.http_protocol import MAX_HEADERS, MAX_PIPELINED
from tandem.api.http_server import Tls, bind, serve
from tandem.api.loaded_model import ModelLoader
from tandem.api.response_writer import ResponseWriter
from tandem.config_limits import LimitsSection
from tandem.errors import EngineFailed
from tests.api.conftest import HANG, Api, FakeBackend, Reply, deltas, details, ids, running

SECONDS = 20.0
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"
GET_HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
SAID = TokenDelta(ids("hello"), details=details())


@pytest.fixture
def backend(folder: Path) -> FakeBackend:
    return FakeBackend(folder)


@contextmanager
def connected(api: Api, sent: bytes = b"") -> Iterator[socket.socket]:
    with closing(socket.create_connection(("127.0.0.1", api.port), SECONDS)) as client:
        client.sendall(sent)
        yield client


def answer(client: socket.socket) -> tuple[Reply, bool]:
    """Read one answer, and whether the server closes the connection after it."""
    response = http.client.HTTPResponse(client)
    response.begin()
    reply = Reply(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
    closes = response.will_close and ended(client)
    response.close()
    return reply, closes


def ended(client: socket.socket) -> bool:
    """Wait for the server to close; False if it sends more."""
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def request(body: bytes, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return POST + b"content-length: %d\r\n%s\r\n" % (len(body), lines) + body


def was_reset(client: socket.socket) -> bool:
    """Wait until the server resets the connection, without reading."""
    poll = select.poll()
    poll.register(client, 0)
    return bool(poll.poll(SECONDS * 1000))


def flood(client: socket.socket, piece: bytes) -> int:
    """Send until the server no longer takes it; returns the bytes that were sent."""
    sent = 0
    try:
        while sent < 2**28:
            client.sendall(piece)
            sent += len(piece)
    except OSError:
        return sent
    raise AssertionError("256 MiB were taken")


# --- heads ---------------------------------------------------------------------------------------------------------


def test_a_head_is_taken_up_to_its_limit(backend: FakeBackend) -> None:
    line = len("/health")
    with running(backend, limits=LimitsSection(max_head=2048)) as api:
        for extra, status in ((0, 200), (1, 431)):
            value = b"x" * (2048 - line - len(b"host") - 1 - 4 - len(b"a") - 4 + extra)
            with connected(api, b"GET /health HTTP/1.1\r\nhost: x\r\na: " + value + b"\r\n\r\n") as client:
                reply, closes = answer(client)
                assert (reply.status, closes) == (status, status == 431)
        assert "at most 2048 bytes" in reply.error["message"]
        assert reply.error["code"] == "headers_too_large"


def test_headers_are_taken_up_to_their_number(backend: FakeBackend) -> None:
    with running(backend) as api:
        for count, status in ((MAX_HEADERS, 200), (MAX_HEADERS + 1, 431)):
            with connected(api, b"GET /health HTTP/1.1\r\n" + b"a:\r\n" * count + b"\r\n") as client:
                assert answer(client)[0].status == status


@pytest.mark.parametrize(
    "begin",
    [b"GET /health HTTP/1.1\r\n", b"GET /", b"GET /health HTTP/1.1\r\na: ", b"", b"\r\n"],
    ids=["headers", "url", "value", "method", "lines"],
)
def test_a_head_without_end_is_refused_or_cut_off(backend: FakeBackend, begin: bytes) -> None:
    piece = b"\r\n" * 5000 if begin == b"\r\n" else b"a" * 10_000
    with running(backend) as api, connected(api, begin) as client:
        assert flood(client, piece) < 2**24
        assert api.get("/health").status == 200


def test_headers_one_after_the_other_without_end_are_refused(backend: FakeBackend) -> None:
    with running(backend) as api, connected(api, b"GET /health HTTP/1.1\r\n") as client:
        assert flood(client, b"name: value\r\n" * 1000) < 2**24


def test_trailers_without_end_are_cut_off_and_not_kept(backend: FakeBackend) -> None:
    sent = POST + b"transfer-encoding: chunked\r\n\r\n5\r\n{    \r\n0\r\n"
    with running(backend) as api, connected(api, sent) as client:
        assert flood(client, b"name: value\r\n" * 1000) < 2**24


@pytest.mark.parametrize("sent", [b"G", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
def test_a_head_that_does_not_come_in_time_is_a_408(backend: FakeBackend, sent: bytes) -> None:
    with running(backend, limits=LimitsSection(head_timeout=0.2)) as api, connected(api, sent) as client:
        reply, closes = answer(client)
        assert (reply.status, reply.error["code"], closes) == (408, "request_timeout", True)


def test_a_connection_that_says_nothing_is_closed(backend: FakeBackend) -> None:
    with running(backend, limits=LimitsSection(head_timeout=0.2)) as api, connected(api) as client:
        assert ended(client)


def test_a_kept_connection_has_as_much_time_for_each_head(backend: FakeBackend) -> None:
    with running(backend, limits=LimitsSection(head_timeout=0.2)) as api, connected(api, GET_HEALTH) as client:
        assert answer(client)[0].status == 200
        client.sendall(b"\r\n")
        assert answer(client)[0].status == 408


def test_what_is_no_http_is_a_400_in_the_shape_of_errors(backend: FakeBackend) -> None:
    with running(backend) as api, connected(api, b"hello\r\n\r\n") as client:
        reply, closes = answer(client)
        assert (reply.status, reply.error["code"], closes) == (400, "invalid_request", True)


def test_requests_that_wait_behind_another_have_a_limit(backend: FakeBackend) -> None:
    backend.script = lambda _: [HANG]
    with running(backend) as api, connected(api, request(b'{"prompt": "x"}')) as client:
        assert backend.hanging.wait(SECONDS)
        client.sendall(GET_HEALTH * (MAX_PIPELINED + 1))
        assert ended(client)
        assert backend.closed.wait(SECONDS)


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_client_that_goes_away_aborts_its_request_also_when_it_has_sent_others(
    backend: FakeBackend, more: int
) -> None:
    backend.script = lambda _: [HANG]
    with running(backend) as api:
        with connected(api, request(b'{"prompt": "x"}')) as client:
            assert backend.hanging.wait(SECONDS)
            client.sendall(GET_HEALTH * more)
        assert backend.closed.wait(SECONDS)
        assert backend.aborted


# --- bodies --------------------------------------------------------------------------------------------------------


def test_a_body_is_taken_up_to_its_limit(backend: FakeBackend) -> None:
    body = json.dumps({"prompt": "hello"}).encode()
    with running(backend, limits=LimitsSection(max_body=len(body))) as api:
        assert api.send("POST", "/v1/completions", body).status == 200
        reply = api.send("POST", "/v1/completions", body + b" ")
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
        assert f"at most {len(body)} are taken" in reply.error["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_after_a_413_nothing_more_is_read(backend: FakeBackend, declared: bool) -> None:
    how = b"content-length: 1000000000" if declared else b"transfer-encoding: chunked"
    with (
        running(backend, limits=LimitsSection(max_body=1000)) as api,
        connected(api, POST + how + b"\r\n\r\n") as client,
    ):
        assert flood(client, b"x" * 2**16 if declared else b"10000\r\n" + b"x" * 2**16 + b"\r\n") < 2**25


def test_a_413_is_read_by_a_client_that_still_sends(backend: FakeBackend) -> None:
    with running(backend, limits=LimitsSection(max_body=1000)) as api, connected(api) as client:
        client.sendall(POST + b"transfer-encoding: chunked\r\n\r\n" + b"800\r\n" + b"x" * 2048 + b"\r\n")
        reply, closes = answer(client)
        assert (reply.status, reply.headers["connection"], closes) == (413, "close", True)


@pytest.mark.parametrize("path", [b"/nowhere", b"/health", b"/v1/models"])
def test_a_body_that_nobody_wants_is_not_read_either(backend: FakeBackend, path: bytes) -> None:
    sent = b"POST " + path + b" HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000000\r\n\r\n"
    with running(backend) as api, connected(api, sent) as client:
        assert flood(client, b"x" * 2**16) < 2**25


@pytest.mark.parametrize("sent", [b"content-length: 100\r\n\r\n{", b"transfer-encoding: chunked\r\n\r\n5\r\n{"])
def test_a_body_that_stops_is_a_408(backend: FakeBackend, sent: bytes) -> None:
    with running(backend, limits=LimitsSection(body_timeout=0.2)) as api, connected(api, POST + sent) as client:
        reply, closes = answer(client)
        assert (reply.status, closes) == (408, True)
        assert "only 1 bytes came within 0.2 s" in reply.error["message"]


def test_bodies_that_are_half_sent_share_a_limit(backend: FakeBackend) -> None:
    body = json.dumps({"prompt": "x" * 50}).encode()
    limits = LimitsSection(max_body=1000, max_body_memory=1000)
    with running(backend, limits=limits) as api, ExitStack() as stack:
        half = POST + b"content-length: 1000\r\n\r\n" + b"x" * 490
        for _ in range(2):
            stack.enter_context(connected(api, half))
        replies = iter(lambda: api.send("POST", "/v1/completions", body), None)
        refused = next(reply for reply in replies if reply is not None and reply.status == 503)
        assert (refused.error["code"], refused.headers["retry-after"]) == ("overloaded", "1")
        assert "--max-body-memory is 1000" in refused.error["message"]
        stack.close()
        assert next(reply for reply in replies if reply is not None and reply.status == 200)


# --- how many ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["max_connections", "max_client_connections"])
def test_beyond_the_connections_only_health_is_answered(backend: FakeBackend, limit: str) -> None:
    with running(backend, limits=LimitsSection(**{limit: 2})) as api, ExitStack() as stack:
        for _ in range(2):
            client = stack.enter_context(connected(api, b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n"))
            assert answer(client)[0].status == 200
        for path, status in (("/v1/models", 503), ("/health", 200), ("/metrics", 200), ("/tandem/engines", 503)):
            assert api.get(path).status == status
        reply = api.complete()
        assert (reply.status, reply.headers["retry-after"], reply.error["code"]) == (503, "1", "overloaded")
        assert f"--{limit.replace('_', '-')}" in reply.error["message"]
        assert backend.requests == []


def test_open_requests_have_a_limit(backend: FakeBackend) -> None:
    backend.script = lambda _: [HANG]
    with running(backend, limits=LimitsSection(max_requests=1)) as api, ExitStack() as stack:
        stack.enter_context(connected(api, request(b'{"prompt": "x"}')))
        assert backend.hanging.wait(SECONDS)
        reply = api.complete()
        assert (reply.status, reply.headers["retry-after"]) == (503, "1")
        assert "--max-requests" in reply.error["message"]


def test_each_key_has_a_limit_of_open_requests(backend: FakeBackend, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("first\nsecond\n")
    backend.script = lambda one: [HANG] if one.request_id == "hang" else deltas("x")
    keys, limits = ApiKeys(file=tmp_path / "keys"), LimitsSection(max_client_requests=1)
    with running(backend, keys=keys, limits=limits) as api, ExitStack() as stack:
        first = b"authorization: Bearer first"
        stack.enter_context(connected(api, request(b'{"prompt": "x"}', first, b"x-request-id: hang")))
        assert backend.hanging.wait(SECONDS)
        replies = {
            key: api.send("POST", "/v1/completions", {"prompt": "x"}, {"Authorization": f"Bearer {key}"})
            for key in ("first", "second")
        }
        assert {key: reply.status for key, reply in replies.items()} == {"first": 429, "second": 200}
        assert (replies["first"].error["code"], replies["first"].headers["retry-after"]) == ("rate_limit_exceeded", "1")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"prompt": ["x"] * 8}, 200, None),
        ({"prompt": ["x"] * 9}, 400, "prompt"),
        ({"prompt": ["x"] * 3, "n": 3}, 400, "n"),
        ({"prompt": ["x"] * 400_000}, 400, None),
        ({"stop": ["x" * 1024] * 16, "n": 8}, 200, None),
        ({"stop": "x" * 1025}, 400, "stop"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"logit_bias": {str(i): 1 for i in range(1024)}}, 400, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, 400, "logit_bias"),
        ({"prompt": [2**70]}, 400, "prompt"),
        ({"prompt": "x" * 1_000_000}, 400, "prompt"),
        ({"max_tokens": 16.0, "n": 1.0, "seed": 3.0}, 200, None),
    ],
)
def test_a_request_asks_for_so_much_and_no_more(folder: Path, fields: Any, status: int, param: str | None) -> None:
    with running(FakeBackend(folder), limits=LimitsSection(max_choices=8)) as api:
        reply = api.complete(**fields)
        assert reply.status == status, reply.body
        assert status == 200 or reply.error["param"] == param


@pytest.mark.parametrize(("count", "status"), [(3, 200), (4, 400), (50_000, 400)])
def test_a_chat_has_so_many_messages_and_no_more(folder: Path, count: int, status: int) -> None:
    with running(FakeBackend(folder), limits=LimitsSection(max_messages=3)) as api:
        assert api.chat(messages=[{"role": "user", "content": "x"}] * count).status == status


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("name", ["model", "a_field_" + "x" * 2000])
def test_long_names_are_clipped_in_errors(api: Api, path: str, name: str) -> None:
    part = {"prompt": "x"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "x"}]}
    reply = api.send("POST", path, part | {name: "y" * 5000})
    assert reply.status in (400, 404)
    assert len(reply.body) < 1500


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stream", "many"), [(True, 5000), (False, 500)])
def test_a_client_that_does_not_read_its_answer_loses_it(backend: FakeBackend, stream: bool, many: int) -> None:
    backend.script = lambda _: [*[TokenDelta(ids("hello ") * 1000, details=details())] * many, *deltas("end")]
    body = json.dumps({"prompt": "x", "stream": stream, "ignore_eos": True, "return_token_ids": True}).encode()
    with running(backend, limits=LimitsSection(write_timeout=0.2)) as api, closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(SECONDS)
        client.connect(("127.0.0.1", api.port))
        client.sendall(request(body))
        if stream:
            assert backend.closed.wait(SECONDS)
            assert backend.aborted
        assert was_reset(client)


def test_a_client_that_reads_slowly_but_does_gets_all(backend: FakeBackend) -> None:
    backend.script = lambda _: [*[TokenDelta(ids("hello ") * 200, details=details())] * 200, *deltas("end")]
    body = json.dumps({"prompt": "x", "stream": True, "return_token_ids": True}).encode()
    with running(backend, limits=LimitsSection(write_timeout=0.5)) as api, closing(socket.socket()) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
        client.settimeout(SECONDS)
        client.connect(("127.0.0.1", api.port))
        client.sendall(request(body, b"connection: close"))
        received = bytearray()
        while part := client.recv(2**18):
            received += part
            time.sleep(0.005)  # this is what makes it slow
        assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


def test_the_headers_of_a_stream_come_before_its_first_token(backend: FakeBackend) -> None:
    backend.script = lambda _: [HANG]
    with running(backend) as api, connected(api, request(b'{"prompt": "x", "stream": true}')) as client:
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")


def test_a_stream_that_waits_has_comments_which_clients_pass_over() -> None:
    async def run() -> list[bytes]:
        sent: list[bytes] = []
        enough = asyncio.Event()

        async def send(message: Any) -> None:
            sent.append(message.get("body", b"headers"))
            if len(sent) == 3:
                enough.set()

        async def receive() -> Any:
            raise AssertionError("it reads nothing")

        writer = ResponseWriter({"type": "http"}, receive, send, comment_every=0.01)
        keeping = asyncio.create_task(writer.keep_alive())
        await asyncio.wait_for(enough.wait(), SECONDS)
        keeping.cancel()
        await writer.error(EngineFailed("gone"))
        return sent

    headers, *comments, error, end = asyncio.run(run())
    assert (headers, end, set(comments)) == (b"headers", b"", {b": waiting\n\n"})
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "gone"


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_are_cancelled_as_the_server_stops_are_told_so(folder: Path, stream: bool) -> None:
    backend = FakeBackend(folder, lambda _: [SAID, HANG])
    body = json.dumps({"prompt": "x", "stream": stream}).encode()

    async def run() -> bytes:
        listener, stop = bind("127.0.0.1", 0), asyncio.Event()
        address = listener.getsockname()
        app = create_app(backend, ModelLoader(backend), kind="router")
        serving = asyncio.create_task(serve(app, listener, stop, grace=1))
        reader, writer = await asyncio.open_connection(*address)
        writer.write(request(body))
        await asyncio.to_thread(backend.hanging.wait, SECONDS)
        stop.set()
        received = await reader.read()
        await serving
        writer.close()
        return received

    head, _, rest = asyncio.run(run()).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK" if stream else b"HTTP/1.1 503 Service Unavailable")
    assert b'"message":"the server is stopping' in rest
    assert b'"code":"unavailable"' in rest
    assert stream or b"retry-after: 1" in head
    assert b"[DONE]" not in rest


# --- TLS -----------------------------------------------------------------------------------------------------------


Loop = Callable[[], asyncio.AbstractEventLoop]
LOOPS = pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@LOOPS
def test_with_a_certificate_the_api_speaks_tls_and_nothing_else(
    loop: Loop, backend: FakeBackend, certificate: Tls
) -> None:
    context = ssl.create_default_context(cafile=certificate[0])
    limits = LimitsSection(head_timeout=0.5, max_body=1000)
    with running(backend, tls=certificate, limits=limits, new_loop=loop) as api:
        with connected(api) as plain, context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(request(b'{"prompt": "x"}'))
            assert answer(client)[0].status == 200
        with connected(api) as plain, context.wrap_socket(plain, server_hostname="localhost") as client:
            client.sendall(request(b" " * 1001))
            assert answer(client)[0].status == 413
        with connected(api, b"GET /health HTTP/1.1\r\n\r\n") as client:
            assert not client.recv(9).startswith(b"HTTP")
        with connected(api) as client:  # who never shakes hands
            assert ended(client)


def test_what_is_refused_at_the_door_is_counted_by_reason(backend: FakeBackend) -> None:
    with running(backend, limits=LimitsSection(max_connections=1, max_head=1024)) as api:
        with connected(api, b"GET /" + b"x" * 2000) as client:
            assert answer(client)[0].status == 431
        with connected(api, request(b'{"prompt": "x"}')) as first:
            assert answer(first)[0].status == 200
            with connected(api, request(b'{"prompt": "x"}')) as second:
                assert answer(second)[0].status == 503
        text = api.get("/metrics").body.decode()
    assert 'tandem_connections_refused_total{reason="overloaded"} 1.0' in text
    assert 'tandem_connections_refused_total{reason="headers_too_large"} 1.0' in text

"""Hostile requests to a real deployment: memory stays bounded, and the next request is answered."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of

MIB = 2**20
MOST_GROWTH = 400 * MIB
"""Of all processes together: --max-body-memory, and room for what one body is decoded to."""


@pytest.fixture(scope="module")
def tiny(serve: Serve) -> Deployment:
    return serve("qwen3", *flags(kv_memory="16MiB", log_level="warning"))


def memory(deployment: Deployment) -> int:
    """Return the bytes that all its processes hold at most so far, pages that they share counted for each."""
    statuses = [Path(f"/proc/{pid}/status").read_text() for pid in deployment.pids]
    lines = [line for status in statuses for line in status.splitlines() if line.startswith("VmHWM")]
    return sum(int(line.split()[1]) * 1024 for line in lines)


def send(deployment: Deployment, pieces: Iterator[bytes]) -> bytes:
    """Send until it no longer takes it; returns the begin of what it answers."""
    at = urlsplit(deployment.http.url)
    with closing(socket.create_connection((at.hostname, at.port), 45)) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
            return client.recv(12)
        except ConnectionError:
            return b""


def post(body: bytes, path: str = "/v1/completions") -> Iterator[bytes]:
    yield b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (path.encode(), len(body))
    yield body


def endless(head: bytes, piece: bytes) -> Iterator[bytes]:
    yield head
    for _ in range(2**30 // len(piece)):
        yield piece


CHUNKED = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
HOSTILE: dict[str, Callable[[], Iterator[bytes]]] = {
    "headers without end": lambda: endless(b"GET /health HTTP/1.1\r\n", b"a: " + b"b" * 65000 + b"\r\n"),
    "chunks without end": lambda: endless(CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    "a prompt of 60 MB": lambda: post(json.dumps({"prompt": "hello world " * 5_000_000}).encode()),
    "a prompt of 30 MB": lambda: post(json.dumps({"prompt": "hello world " * 2_500_000}).encode()),
    "400,000 prompts": lambda: post(json.dumps({"prompt": ["hello world"] * 400_000}).encode()),
    "10,000,000 empty lists": lambda: post(b'{"prompt": [' + b"[]," * 9_999_999 + b"[]]}"),
    "500,000 messages": lambda: post(
        json.dumps({"messages": [{"role": "user", "content": "hi"}] * 500_000}).encode(), "/v1/chat/completions"
    ),
    "long stop strings": lambda: post(json.dumps({"prompt": "x", "n": 128, "stop": ["a" * 31_000] * 16}).encode()),
    "2,000,000 unknown fields": lambda: post(b"{" + b",".join(b'"k%d":1' % i for i in range(2_000_000)) + b"}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_too_much_is_refused_and_makes_nothing_grow(tiny: Deployment, name: str) -> None:
    before = memory(tiny)
    assert send(tiny, HOSTILE[name]()) in (b"", b"HTTP/1.1 400", b"HTTP/1.1 413", b"HTTP/1.1 431")
    assert memory(tiny) - before < MOST_GROWTH
    assert tiny.http.get("/health").status == 200
    assert len(tiny.http.complete(prompt_of(10), max_tokens=4, ignore_eos=True).token_ids) == 4


def test_bodies_that_are_half_sent_share_their_memory(tiny: Deployment) -> None:
    before = memory(tiny)
    at = urlsplit(tiny.http.url)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 32000000\r\n\r\n"
    refused = 0
    with ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(closing(socket.create_connection((at.hostname, at.port), 45)))
            try:
                client.sendall(head + b"x" * 31_000_000)
            except ConnectionError:
                refused += 1
        assert refused >= 10
        assert memory(tiny) - before < MOST_GROWTH
        assert tiny.http.get("/health").status == 200
    assert len(tiny.http.complete(prompt_of(10), max_tokens=4, ignore_eos=True).token_ids) == 4

"""Bytes at ports: nonsense, half greetings of ZeroMQ, wrong mechanisms, and HTTP that is none."""

from __future__ import annotations

import contextlib
import random
import socket

from tests.fuzz.bodies import Bodies
from tests.fuzz.live.cluster import FuzzedCluster
from tests.fuzz.mutator import spoil

SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
MECHANISMS = (b"NULL", b"PLAIN", b"CURVE", b"GSSAPI", b"", b"X" * 20)
HELLO = b"\x04\xc8\x05HELLO\x01\x00" + bytes(72)
READY = b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
PLAIN_HELLO = b"\x04\x0a\x05HELLO\x01a\x01b"
OPEN_AT_ONCE = 64

REQUESTS = (
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 30\r\n\r\n",
    b'POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"pro\r\nffffffff\r\n',
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}{}{}",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"GET /%ff%00/../..//v1/models?a=\xff HTTP/1.1\r\n\xff: \xff\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 20,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32),
)


def greeting(rng: random.Random) -> bytes:
    """Return what a client of ZeroMQ might say first: ZMTP 3.1 (RFC 37), more or less."""
    mechanism = rng.choice(MECHANISMS).ljust(20, b"\0")
    whole = SIGNATURE + rng.choice([b"\x03\x00", b"\x03\x01", b"\x01\x00", b"\xff\xff"]) + mechanism + bytes(32)
    said = (
        whole
        + rng.choice([b"", HELLO, READY, PLAIN_HELLO])
        + rng.choice([b"", rng.randbytes(40), b"\x02" + b"\xff" * 8])
    )
    return said[: rng.randrange(len(said) + 1)] if rng.random() < 0.4 else said


def http_bytes(rng: random.Random, bodies: Bodies) -> bytes:
    chance = rng.random()
    if chance < 0.4:
        request = rng.choice(REQUESTS)
        return spoil(request, rng) if rng.random() < 0.6 else request
    body = bodies.body(rng, most_choices=2)
    headers = "".join(f"{name}: {value}\r\n" for name, value in bodies.headers(rng).items()).encode("latin-1")
    path = rng.choice([b"/v1/completions", b"/v1/chat/completions"])
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n" % len(body)
    request = head + headers + b"Connection: close\r\n\r\n" + body
    return request if chance < 0.9 else request[: rng.randrange(len(request))]


class RawClients:
    """Connections that say something once, and stay open until there are too many of them.

    Args:
        cluster: whose ports are tried in turn.
    """

    def __init__(self, cluster: FuzzedCluster, rng: random.Random) -> None:
        self._cluster = cluster
        self._rng = rng
        self._bodies = Bodies()
        self._open: list[socket.socket] = []
        self.last = b""

    def feed(self, kind: str) -> bytes:
        """Say something to a port of this kind; return what was said."""
        rng = self._rng
        port = rng.choice(self._cluster.ports[kind])
        if kind == "http":
            data = http_bytes(rng, self._bodies)
        else:
            data = greeting(rng) if rng.random() < 0.7 else rng.randbytes(rng.choice([1, 9, 64, 1000]))
        connection = socket.create_connection((port.host, port.number), 10)
        connection.settimeout(5)
        with contextlib.suppress(OSError):
            connection.sendall(data)
        self._open.append(connection)
        while len(self._open) > OPEN_AT_ONCE:
            self._hang_up(self._open.pop(0))
        self._cluster.count(f"raw {kind}")
        return data

    def close(self) -> None:
        while self._open:
            self._hang_up(self._open.pop())

    def _hang_up(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        with contextlib.suppress(OSError):
            while connection.recv(65536):
                pass
        connection.close()

"""Other users of the machine cannot pass for a part of `tandem serve`, which needs no cluster key for that."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from tandem.commands.demo import MODEL
from tandem.ids import EngineIdentity
from tests.support.deployment import Deployment, flags
from tests.support.registrations import make_register

MILLISECONDS = 20_000
TURNED_AWAY = (
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_DISCONNECTED
)


@pytest.fixture
def split() -> Iterator[Deployment]:
    with Deployment(MODEL, *flags(kv_memory="16MiB", connector="tcp", threads=1)) as deployment:
        yield deployment


def listening_ports(pids: set[int]) -> set[int]:
    """All ports on which these processes listen."""
    links: set[str] = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                links.add(os.readlink(descriptor))
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    listening = (fields for fields in lines if fields[3] == "0A" and f"socket:[{fields[9]}]" in links)
    return {int(fields[1].rpartition(":")[2], 16) for fields in listening}


def test_a_stranger_is_let_in_nowhere(split: Deployment) -> None:
    engines = split.engines()
    http = {int(url.rpartition(":")[2]) for url in (split.http.url, *(split.engine(name).url for name in engines))}
    internal = listening_ports(split.pids) - http
    assert len(internal) == 11, "control ports of router and APIs, and each leader's three and KV port"
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    for port in internal:
        for identity in (b"0", b"1", engines["prefill-0"]["incarnation"].encode()):
            socket = context.socket(zmq.DEALER)
            socket.linger = 0
            monitor = socket.get_monitor_socket(TURNED_AWAY)
            socket.identity = identity
            socket.connect(f"tcp://127.0.0.1:{port}")
            register = make_register(EngineIdentity("prefill-0", engines["prefill-0"]["incarnation"]), "prefill")
            socket.send(msgspec.msgpack.encode(register))
            assert monitor.poll(MILLISECONDS), f"port {port} does not turn {identity!r} away"
            socket.disable_monitor()
            socket.close()
    assert split.http.complete("Reverse: abc", max_tokens=4).how["disaggregated"]
    now = split.engines()
    assert {name: one["incarnation"] for name, one in now.items()} == {
        name: one["incarnation"] for name, one in engines.items()
    }
    context.destroy(linger=0)

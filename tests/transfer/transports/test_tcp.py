"""The promises of the tcp transport beyond those of every transport: towards peers that break the rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq

from tandem.errors import PeerLost, TransferError
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region, Transport
from tandem.transfer.transports.tcp.client import TcpTransport
from tandem.transfer.transports.tcp.protocol import (
    ADDRESSES,
    ANSWERS,
    FETCHES,
    PIECE_BYTES,
    PIECE_RUNS,
    Fetch,
    FetchPiece,
    FetchRefused,
    ServerAddress,
    vector_bytes,
)
from tandem.wire.keys import ClusterKey, new_key
from tandem.wire.sockets import Sockets
from tests.transfer.transports.peer_process import Memory, ended, pattern, poll_once, poll_until, runs

MIB = 1024 * 1024
SIZE = 8 * MIB
HOST = "127.0.0.1"

Socket = zmq.Socket[bytes]


@dataclass
class Rank:
    memory: Memory
    transport: Transport


def make_rank(name: str, seed: int, key: ClusterKey | None = None) -> Rank:
    memory = Memory(SIZE, seed)
    transport = TcpTransport(name, HOST, key)
    transport.register(memory.region)
    return Rank(memory, transport)


@pytest.fixture
def server() -> Iterator[Rank]:
    rank = make_rank("server", seed=1)
    yield rank
    rank.transport.close()


@pytest.fixture
def reader() -> Iterator[Rank]:
    rank = make_rank("reader", seed=0)
    yield rank
    rank.transport.close()


@pytest.fixture
def sockets() -> Iterator[Sockets[Socket]]:
    context: zmq.Context[Socket] = zmq.Context()
    yield Sockets(context, None)
    context.destroy(linger=0)


def require_honest_read(reader: Rank, server: Rank) -> None:
    reader.transport.connect(server.transport.describe())
    read = reader.transport.post("server", runs((0, 0, SIZE)))
    poll_until(lambda: ended(read), reader.transport, server.transport)
    assert read.state is ReadState.DONE
    assert np.array_equal(reader.memory.bytes, pattern(SIZE, 1))


def connect_raw(sockets: Sockets[Socket], server: Rank) -> Socket:
    address = ADDRESSES.decode(server.transport.describe().metadata)
    return sockets.connect(zmq.DEALER, address.host, address.port)


def fetch(offsets: list[int], lengths: list[int], to: str = "server") -> bytes:
    vectors = (vector_bytes(np.array(values, dtype=np.int64)) for values in (offsets, lengths))
    return FETCHES.encode(Fetch(to, 1, 0, *vectors))


@pytest.mark.parametrize(
    ("offsets", "lengths", "to"),
    [
        pytest.param([SIZE - 1], [2], "server", id="past the end"),
        pytest.param([-1], [1], "server", id="before the start"),
        pytest.param([0], [-1], "server", id="negative length"),
        pytest.param([2**63 - 1], [2**63 - 1], "server", id="overflow"),
        pytest.param([0], [PIECE_BYTES + 1], "server", id="more than a piece"),
        pytest.param([0] * PIECE_RUNS, [SIZE] * PIECE_RUNS, "server", id="a flood for one small fetch"),
        pytest.param([0, 1], [1], "server", id="vectors of unequal length"),
        pytest.param([0], [1], "another", id="meant for another agent"),
    ],
)
def test_a_fetch_against_the_rules_is_refused(
    server: Rank, reader: Rank, sockets: Sockets[Socket], offsets: list[int], lengths: list[int], to: str
) -> None:
    hostile = connect_raw(sockets, server)
    hostile.send(fetch(offsets, lengths, to))
    poll_until(lambda: bool(hostile.poll(0)), server.transport)
    frames = hostile.recv_multipart()
    assert len(frames) == 1
    assert isinstance(ANSWERS.decode(frames[0]), FetchRefused)
    require_honest_read(reader, server)


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"garbage"],
        [b"\xc1" * 1000],
        [fetch([0], [1]), b"and more"],
        [ANSWERS.encode(FetchPiece("server", 1, 0)), b"x"],
        [msgspec.msgpack.encode({"type": "fetch", "to": "server", "read": -1, "piece": 0})],
    ],
)
def test_what_is_no_fetch_is_dropped_without_an_answer(
    server: Rank, reader: Rank, sockets: Sockets[Socket], frames: list[bytes]
) -> None:
    hostile = connect_raw(sockets, server)
    hostile.send_multipart(frames)
    hostile.send(fetch([0], [4]))
    poll_until(lambda: bool(hostile.poll(0)), server.transport)
    assert hostile.recv_multipart() == [
        ANSWERS.encode(FetchPiece("server", 1, 0)),
        server.memory.bytes[:4].tobytes(),
    ]
    require_honest_read(reader, server)


def test_a_reader_that_fetches_and_never_takes_harms_nobody(
    server: Rank, reader: Rank, sockets: Sockets[Socket]
) -> None:
    greedy = connect_raw(sockets, server)
    for _ in range(300):
        greedy.send(fetch([0, SIZE // 2], [MIB, MIB]))
    for _ in range(100):
        poll_once(server.transport)
    require_honest_read(reader, server)


# --- a server that lies ----------------------------------------------------------------------------------------


@pytest.fixture
def liar(sockets: Sockets[Socket]) -> tuple[Socket, RankEndpoint]:
    listener, port = sockets.bind(zmq.ROUTER, HOST, 0)
    metadata = ADDRESSES.encode(ServerAddress(HOST, port))
    return listener, RankEndpoint("liar", metadata, Region(4096, SIZE))


LIES: list[Any] = [
    pytest.param([ANSWERS.encode(FetchPiece("liar", 1, 0)), b"\x01" * 99], id="too few bytes"),
    pytest.param([ANSWERS.encode(FetchPiece("liar", 1, 0)), b"\x01" * 101], id="too many bytes"),
    pytest.param([ANSWERS.encode(FetchPiece("liar", 1, 0))], id="no bytes"),
    pytest.param([ANSWERS.encode(FetchPiece("liar", 2, 0)), b"\x01" * 100], id="another read"),
    pytest.param([ANSWERS.encode(FetchPiece("liar", 1, 1)), b"\x01" * 100], id="another piece"),
    pytest.param([ANSWERS.encode(FetchPiece("other", 1, 0)), b"\x01" * 100], id="another agent"),
    pytest.param([b"garbage", b"\x01" * 100], id="garbage"),
    pytest.param([fetch([0], [100]), b"\x01" * 100], id="not an answer"),
    pytest.param([ANSWERS.encode(FetchRefused("liar", 1, "I will not"))], id="refused"),
]


@pytest.mark.parametrize("answer", LIES)
def test_an_answer_against_the_rules_ends_the_peer_and_writes_nothing(
    reader: Rank, liar: tuple[Socket, RankEndpoint], answer: list[bytes]
) -> None:
    listener, endpoint = liar
    reader.transport.connect(endpoint)
    read = reader.transport.post("liar", runs((0, 0, 100)))
    poll_until(lambda: bool(listener.poll(0)), reader.transport)
    sender, _ = listener.recv_multipart()
    listener.send_multipart([sender, *answer])
    listener.send_multipart([sender, ANSWERS.encode(FetchPiece("liar", 1, 0)), b"\x01" * 100])
    poll_until(lambda: ended(read), reader.transport)
    assert read.state is ReadState.FAILED
    assert not reader.memory.bytes.any()
    with pytest.raises(PeerLost):
        reader.transport.post("liar", runs((0, 0, 100)))


def test_an_answer_that_comes_twice_is_not_written_twice(reader: Rank, liar: tuple[Socket, RankEndpoint]) -> None:
    listener, endpoint = liar
    reader.transport.connect(endpoint)
    read = reader.transport.post("liar", runs((0, 0, 100)))
    poll_until(lambda: bool(listener.poll(0)), reader.transport)
    sender, _ = listener.recv_multipart()
    header = ANSWERS.encode(FetchPiece("liar", 1, 0))
    listener.send_multipart([sender, header, b"\x01" * 100])
    listener.send_multipart([sender, header, b"\x02" * 100])
    poll_until(lambda: ended(read), reader.transport)
    assert read.state is ReadState.DONE
    poll_until(lambda: not reader.transport.wait_on()[1:], reader.transport)
    assert set(reader.memory.bytes[:100].tolist()) == {1}


def test_nobody_listening_fails_the_read(reader: Rank, sockets: Sockets[Socket]) -> None:
    listener, port = sockets.bind(zmq.ROUTER, HOST, 0)
    listener.close(linger=0)
    endpoint = RankEndpoint("gone", ADDRESSES.encode(ServerAddress(HOST, port)), Region(4096, SIZE))
    reader.transport.connect(endpoint)
    read = reader.transport.post("gone", runs((0, 0, 100)))
    poll_until(lambda: ended(read), reader.transport)
    assert read.state is ReadState.FAILED


def test_a_peer_off_loopback_is_refused_without_a_key(reader: Rank) -> None:
    endpoint = RankEndpoint("far", ADDRESSES.encode(ServerAddress("192.0.2.1", 4000)), Region(4096, SIZE))
    with pytest.raises(TransferError, match="keygen"):
        reader.transport.connect(endpoint)


def test_with_the_cluster_key_ranks_read_and_with_another_they_do_not() -> None:
    key = new_key()
    server, reader = make_rank("server", 1, key), make_rank("reader", 0, key)
    stranger = make_rank("stranger", 0, new_key())
    try:
        require_honest_read(reader, server)
        stranger.transport.connect(server.transport.describe())
        read = stranger.transport.post("server", runs((0, 0, 100)))
        poll_until(lambda: ended(read), stranger.transport, server.transport)
        assert read.state is ReadState.FAILED
        assert not stranger.memory.bytes.any()
    finally:
        for rank in (server, reader, stranger):
            rank.transport.close()

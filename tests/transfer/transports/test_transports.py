"""The promises of every transport, between real processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from tandem.errors import ConfigError, PeerLost, TransferError
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region, Transport
from tandem.transfer.transports.registry import TRANSPORT_NAMES, default_transport, transport_factory
from tests.transfer.transports.peer_process import (
    KINDS,
    Memory,
    PeerProcess,
    ended,
    make_transport,
    pattern,
    poll_once,
    poll_until,
    runs,
)

MIB = 1024 * 1024
SIZE = 40 * MIB

# Peers of these take part in a read, so one that is stopped keeps it from ending.
TAKING_PART = ["nixl-over-tcp", "tcp"]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def peer(kind: str) -> Iterator[PeerProcess]:
    with PeerProcess(kind, SIZE, seed=1) as process:
        yield process


@pytest.fixture
def memory() -> Memory:
    return Memory(SIZE)


@pytest.fixture
def transport(kind: str, memory: Memory) -> Iterator[Transport]:
    made = make_transport(kind, memory)
    yield made
    made.close()


def read_all(transport: Transport, agent: str, *triples: tuple[int, int, int]) -> None:
    read = transport.post(agent, runs(*triples))
    poll_until(lambda: ended(read), transport)
    assert (read.state, read.error) == (ReadState.DONE, None)


def error_of(transport: Transport, endpoint: RankEndpoint, *triples: tuple[int, int, int]) -> str | None:
    """Why a read fails that was tried, connecting first; None if it is done."""
    try:
        transport.connect(endpoint)
        read = transport.post(endpoint.agent, runs(*triples))
    except TransferError as error:
        return str(error)
    poll_until(lambda: read.state is not ReadState.IN_PROGRESS, transport)
    assert (read.state is not ReadState.DONE) == (read.error is not None)
    return read.error


def block_list(count: int, size: int, gap: int) -> list[tuple[int, int, int]]:
    """Blocks that are apart in the source, dense in the destination and in the opposite order there."""
    return [(i * (size + gap), (count - 1 - i) * size, size) for i in range(count)]


@pytest.mark.parametrize(
    "triples",
    [
        pytest.param([(0, 0, 1)], id="one byte"),
        pytest.param([(7, 13, 4096)], id="unaligned"),
        pytest.param([(SIZE - 1, SIZE - 1, 1), (0, 0, 0)], id="last byte and an empty run"),
        pytest.param([(0, 0, SIZE)], id="the whole region, longer than a piece"),
        pytest.param(block_list(9000, 100, 3), id="many tiny blocks"),
        pytest.param(block_list(300, 64 * 1024, 512), id="blocks"),
        pytest.param([(5, 3 * MIB, 3 * MIB), (20 * MIB, 17, 2 * MIB + 1), (0, 39 * MIB, 9)], id="uneven"),
    ],
)
def test_a_read_brings_the_bytes_of_its_runs_and_touches_no_others(
    transport: Transport, memory: Memory, peer: PeerProcess, triples: list[tuple[int, int, int]]
) -> None:
    transport.connect(peer.endpoint)
    read_all(transport, peer.endpoint.agent, *triples)
    source, expected = pattern(SIZE, 1), pattern(SIZE, 0)
    for src, dst, length in triples:
        expected[dst : dst + length] = source[src : src + length]
    assert np.array_equal(memory.bytes, expected)


def test_an_empty_read_is_done_at_once(transport: Transport, peer: PeerProcess) -> None:
    transport.connect(peer.endpoint)
    assert transport.post(peer.endpoint.agent, runs()).state is ReadState.DONE


def test_many_reads_in_progress_each_bring_their_own_bytes(
    transport: Transport, memory: Memory, peer: PeerProcess
) -> None:
    transport.connect(peer.endpoint)
    reads = [transport.post(peer.endpoint.agent, runs((i * MIB, (39 - i) * MIB, MIB))) for i in range(40)]
    poll_until(lambda: all(map(ended, reads)), transport)
    assert {read.state for read in reads} == {ReadState.DONE}
    source = pattern(SIZE, 1).reshape(40, MIB)
    assert np.array_equal(memory.bytes.reshape(40, MIB), source[::-1])


@pytest.mark.parametrize(
    "triple",
    [(-1, 0, 1), (0, -1, 1), (0, 0, -1), (SIZE, 0, 1), (0, SIZE - 1, 2), (1, 0, SIZE), (2**63 - 1, 0, 2)],
)
def test_runs_outside_of_either_region_are_refused_by_the_reader(
    transport: Transport, memory: Memory, peer: PeerProcess, triple: tuple[int, int, int]
) -> None:
    transport.connect(peer.endpoint)
    with pytest.raises(TransferError, match="outside"):
        transport.post(peer.endpoint.agent, runs((0, 0, 8), triple))
    assert not memory.bytes.any()


def test_a_peer_that_is_not_connected_cannot_be_read(transport: Transport, peer: PeerProcess) -> None:
    with pytest.raises(TransferError, match="not connected"):
        transport.post(peer.endpoint.agent, runs((0, 0, 1)))


@pytest.mark.parametrize("damage", [b"", b"\0", b"no metadata at all" * 30, None])
def test_damaged_metadata_is_refused(transport: Transport, peer: PeerProcess, damage: bytes | None) -> None:
    metadata = damage if damage is not None else peer.endpoint.metadata[:-7]
    with pytest.raises(TransferError):
        transport.connect(msgspec.structs.replace(peer.endpoint, metadata=metadata))
    transport.connect(peer.endpoint)
    read_all(transport, peer.endpoint.agent, (0, 0, 4096))


def test_the_metadata_of_another_agent_is_never_read_as_the_one_that_was_meant(
    transport: Transport, memory: Memory, peer: PeerProcess
) -> None:
    stale = msgspec.structs.replace(peer.endpoint, agent="an-earlier-incarnation")
    assert error_of(transport, stale, (0, 0, 4096)) is not None
    assert not memory.bytes.any()


def test_disconnected_and_connected_again_it_reads_again(
    transport: Transport, memory: Memory, peer: PeerProcess
) -> None:
    for start in (0, MIB):
        transport.connect(peer.endpoint)
        read_all(transport, peer.endpoint.agent, (start, start, MIB))
        transport.disconnect(peer.endpoint.agent)
        with pytest.raises(TransferError, match="not connected"):
            transport.post(peer.endpoint.agent, runs((0, 0, 1)))
    assert np.array_equal(memory.bytes[: 2 * MIB], pattern(SIZE, 1)[: 2 * MIB])


def test_both_directions_at_once(kind: str, transport: Transport, memory: Memory, peer: PeerProcess) -> None:
    ours = Memory(SIZE, seed=2)
    serving = make_transport(kind, ours)
    try:
        answer = peer.start("read", serving.describe(), [(0, 32 * MIB, 8 * MIB)])
        transport.connect(peer.endpoint)
        read = transport.post(peer.endpoint.agent, runs((0, 0, 32 * MIB)))
        poll_until(lambda: ended(read) and peer.has_answer(), transport, serving)
        assert answer() == (ReadState.DONE, None)
    finally:
        serving.close()
    arrived = peer.ask("bytes", 32 * MIB, 40 * MIB)
    peer.ask("fill", 1)
    assert arrived == ours.bytes[: 8 * MIB].tobytes()
    assert np.array_equal(memory.bytes[: 32 * MIB], pattern(SIZE, 1)[: 32 * MIB])


def test_closing_twice_is_fine_and_then_nothing_works(kind: str, peer: PeerProcess) -> None:
    transport = make_transport(kind, Memory(MIB))
    transport.connect(peer.endpoint)
    transport.close()
    transport.close()
    with pytest.raises(TransferError):
        transport.post(peer.endpoint.agent, runs((0, 0, 1)))
    with pytest.raises(TransferError):
        transport.describe()


def test_memory_is_registered_once(transport: Transport, memory: Memory) -> None:
    with pytest.raises(TransferError, match="already"):
        transport.register(memory.region)


def test_a_peer_that_is_killed_fails_its_reads_and_its_next_life_is_read(
    kind: str, transport: Transport, memory: Memory, peer: PeerProcess
) -> None:
    with PeerProcess(kind, SIZE, seed=3, agent="first-incarnation") as first:
        transport.connect(peer.endpoint)
        transport.connect(first.endpoint)
        read_all(transport, "first-incarnation", (0, 0, MIB))
        first.kill()
        assert error_of(transport, first.endpoint, (0, 0, SIZE)) is not None
        with pytest.raises(PeerLost):
            transport.post("first-incarnation", runs((0, 0, SIZE)))
        transport.disconnect("first-incarnation")
    with PeerProcess(kind, SIZE, seed=4, agent="second-incarnation") as second:
        transport.connect(second.endpoint)
        read_all(transport, "second-incarnation", (0, 0, SIZE))
        assert np.array_equal(memory.bytes, pattern(SIZE, 4))
    read_all(transport, peer.endpoint.agent, (0, 0, MIB))
    assert np.array_equal(memory.bytes[:MIB], pattern(SIZE, 1)[:MIB])


def test_a_read_that_a_killed_peer_failed_may_write_until_a_while_after_it_is_disconnected(
    kind: str, transport: Transport
) -> None:
    with PeerProcess(kind, SIZE, seed=3, agent="killed") as killed:
        transport.connect(killed.endpoint)
        read_all(transport, "killed", (0, 0, MIB))
        killed.kill()
        read = transport.post("killed", runs((0, 0, SIZE)))
        poll_until(lambda: read.state is not ReadState.IN_PROGRESS, transport)
        assert read.state is (ReadState.FAILED if kind == "tcp" else ReadState.FAILING)
        for _ in range(20):
            poll_once(transport)
        assert read.state is (ReadState.FAILED if kind == "tcp" else ReadState.FAILING), "it is connected still"
        transport.disconnect("killed")
        poll_until(lambda: read.state is ReadState.FAILED, transport)
        assert read.error is not None


@pytest.mark.parametrize("kind", TAKING_PART, scope="module", indirect=False)
class TestAPeerThatIsStopped:
    def test_keeps_its_reads_in_progress_until_it_goes_on(
        self, transport: Transport, memory: Memory, peer: PeerProcess
    ) -> None:
        transport.connect(peer.endpoint)
        read_all(transport, peer.endpoint.agent, (0, 0, 8))
        peer.stop()
        try:
            read = transport.post(peer.endpoint.agent, runs((0, 0, SIZE)))
            for _ in range(100):
                poll_once(transport)
            assert not ended(read)
        finally:
            peer.go_on()
        poll_until(lambda: ended(read), transport)
        assert read.state is ReadState.DONE
        assert np.array_equal(memory.bytes, pattern(SIZE, 1))

    def test_writes_nothing_once_its_read_has_failed(
        self, transport: Transport, memory: Memory, peer: PeerProcess
    ) -> None:
        transport.connect(peer.endpoint)
        read_all(transport, peer.endpoint.agent, (0, 0, 8))
        peer.stop()
        try:
            read = transport.post(peer.endpoint.agent, runs((0, 0, 32 * MIB)))
            poll_once(transport)
            transport.disconnect(peer.endpoint.agent)
            with pytest.raises(TransferError, match="not connected"):
                transport.post(peer.endpoint.agent, runs((0, 0, 8)))
        finally:
            peer.go_on()
        poll_until(lambda: ended(read), transport)
        assert read.state is ReadState.FAILED
        assert "disconnected" in (read.error or "")
        memory.fill(0)
        transport.connect(peer.endpoint)
        read_all(transport, peer.endpoint.agent, (0, 32 * MIB, MIB))
        assert not memory.bytes[: 32 * MIB].any()

    def test_is_taken_back_while_a_read_that_was_given_up_has_not_ended(
        self, transport: Transport, memory: Memory, peer: PeerProcess
    ) -> None:
        transport.connect(peer.endpoint)
        read_all(transport, peer.endpoint.agent, (0, 0, 8))
        peer.stop()
        try:
            given_up = transport.post(peer.endpoint.agent, runs((0, 0, MIB)))
            transport.disconnect(peer.endpoint.agent)
            transport.connect(peer.endpoint)
            wanted = transport.post(peer.endpoint.agent, runs((MIB, MIB, MIB)))
        finally:
            peer.go_on()
        poll_until(lambda: ended(given_up) and ended(wanted), transport)
        assert (given_up.state, wanted.state) == (ReadState.FAILED, ReadState.DONE)
        assert np.array_equal(memory.bytes[MIB : 2 * MIB], pattern(SIZE, 1)[MIB : 2 * MIB])

    def test_does_not_keep_the_reader_from_closing(self, kind: str) -> None:
        memory = Memory(SIZE)
        transport = make_transport(kind, memory)
        with PeerProcess(kind, SIZE, seed=5) as peer:
            transport.connect(peer.endpoint)
            read_all(transport, peer.endpoint.agent, (0, 0, 8))
            peer.stop()
            read = transport.post(peer.endpoint.agent, runs((0, 0, SIZE)))
            transport.close()
            assert read.state is ReadState.FAILED
            memory.fill(0)
            peer.go_on()
            # UCX may end the serving process here, see nixl/transport.py; ours must go on and be left alone.
            with contextlib.suppress(EOFError, OSError):
                peer.ask("ping")
            assert not memory.bytes.any()


def test_connectors_are_known_by_name_and_nixl_is_the_default() -> None:
    assert TRANSPORT_NAMES == ("nixl", "tcp")
    assert default_transport() == "nixl"
    with pytest.raises(ConfigError, match="nixl, tcp"):
        transport_factory("carrier-pigeon", None)


def test_the_tcp_connector_refuses_gpu_memory_and_hosts_off_loopback() -> None:
    transport = transport_factory("tcp", None)("agent", "127.0.0.1")
    with pytest.raises(TransferError, match="nixl"):
        transport.register(Region(4096, 4096, device=0))
    transport.close()
    outside = transport_factory("tcp", None)("agent", "192.0.2.1")
    with pytest.raises(ConfigError, match="keygen"):
        outside.register(Memory(4096).region)
    outside.close()

"""The transfer thread of a rank, with memory in place of a network."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import EngineFailed, TransferError
from tandem.kv.layout import Axis, KvLayout, block_major, layer_major, token_major
from tandem.kv.runs import Runs
from tandem.kv.shard import shard
from tandem.transfer.handshake import RankDescriptor
from tandem.transfer.thread.thread_messages import (
    ClosePeer,
    FromTransferThread,
    OpenPeer,
    PeerOpened,
    ReadEnded,
    ReadOrder,
    ReadQuiet,
    StopThread,
    ThreadAlive,
)
from tandem.transfer.thread.transfer_thread import LEADER_EVENTS, TransferThread, start_transfer_thread
from tandem.transfer.thread.verification import Verifier
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region
from tandem.wire.codec import Codec

LAYERS, HEADS, DIM, BLOCKS = 4, 4, 2, 6
MAKERS = [block_major, token_major, layer_major]
AXES = (Axis.BLOCK, Axis.LAYER, Axis.KV, Axis.HEAD, Axis.TOKEN, Axis.DIM)


@dataclass
class FakeRead:
    state: ReadState = ReadState.IN_PROGRESS
    error: str | None = None


@dataclass
class FakeTransport:
    """Copies between arrays. While `held`, reads stay in progress until `poll` finds it lifted."""

    memories: dict[str, np.ndarray]
    own: np.ndarray
    held: bool = False
    refuse: set[str] = field(default_factory=set)
    fail_posts_after: int | None = None
    connected: list[str] = field(default_factory=list)
    waiting: list[tuple[str, FakeRead, Any]] = field(default_factory=list)
    closed: int = 0

    def connect(self, peer: RankEndpoint) -> None:
        if peer.agent in self.refuse:
            raise TransferError(f"{peer.agent} is not there")
        if peer.agent not in self.connected:
            self.connected.append(peer.agent)

    def disconnect(self, agent: str) -> None:
        if agent in self.connected:
            self.connected.remove(agent)
        for name, read, _ in self.waiting:
            if name == agent:
                read.state, read.error = ReadState.FAILED, f"disconnected from {agent}"
        self.waiting = [entry for entry in self.waiting if entry[0] != agent]

    def post(self, agent: str, runs: Runs) -> FakeRead:
        if agent not in self.connected:
            raise TransferError(f"{agent} is not connected")
        if self.fail_posts_after is not None:
            if self.fail_posts_after == 0:
                raise TransferError(f"{agent} is lost")
            self.fail_posts_after -= 1
        read = FakeRead()
        self.waiting.append((agent, read, runs))
        return read

    def poll(self) -> None:
        if self.held:
            return
        for agent, read, runs in self.waiting:
            for source, destination, length in zip(runs.src_offset, runs.dst_offset, runs.length, strict=True):
                self.own[destination : destination + length] = self.memories[agent][source : source + length]
            read.state = ReadState.DONE
        self.waiting.clear()

    def wait_on(self) -> Sequence[Any]:
        return []

    def close(self) -> None:
        self.closed += 1

    register = describe = None  # done before a transfer_thread is made


class Rig:
    """A transfer_thread that the test steps by hand, in place of `run`."""

    def __init__(
        self, transport: FakeTransport, layouts: Sequence[KvLayout], rank: int = 0, verifier: Verifier | None = None
    ) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.leader = self.context.socket(zmq.PAIR)
        self.leader.bind("inproc://leader")
        self.leader.rcvtimeo = 10_000
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.connect("inproc://leader")
        self.transport = transport
        self.transfer_thread = TransferThread(rank, layouts, transport, self.socket, verifier)  # type: ignore[arg-type]
        self._reports: Codec[FromTransferThread] = Codec(FromTransferThread)

    def tell(self, *orders: Any) -> None:
        for order in orders:
            self.leader.send(order if isinstance(order, bytes) else self._reports.encode(order))
        self.step()

    def step(self) -> None:
        self.transfer_thread.step()

    def heard(self) -> list[FromTransferThread]:
        found = []
        while self.leader.poll(0):
            found.append(self._reports.decode(self.leader.recv()))
        return found

    def close(self) -> None:
        self.context.destroy(linger=0)


@contextmanager
def rig(transport: FakeTransport, layouts: Sequence[KvLayout], rank: int = 0) -> Iterator[Rig]:
    made = Rig(transport, layouts, rank)
    try:
        yield made
    finally:
        made.close()


def layouts(tp: int, pp: int, block_size: int, make: Any) -> list[KvLayout]:
    return [
        make(
            shard(LAYERS, HEADS, tp=tp, pp=pp, tp_rank=rank % tp, pp_rank=rank // tp),
            blocks=BLOCKS, block_size=block_size, head_dim=DIM, itemsize=4,
        )
        for rank in range(tp * pp)
    ]  # fmt: skip


def descriptors(of: Sequence[KvLayout], engine: str = "p") -> list[RankDescriptor]:
    return [
        RankDescriptor(
            rank, 0, 0, "node", layout, RankEndpoint(f"{engine}/{rank}", b"", Region(0, layout.nbytes))
        )
        for rank, layout in enumerate(of)
    ]  # fmt: skip


def view(memory: np.ndarray, layout: KvLayout) -> np.ndarray:
    """[block, layer, kv, head, token, dim], whatever the order in memory."""
    sizes, strides = zip(*((layout.size(a), layout.stride(a)) for a in AXES), strict=True)
    return np.ndarray(sizes, np.float32, memory.data, 0, strides)


def world(tokens: int) -> np.ndarray:
    """The KV of a request: [token, layer, kv, head, dim], each value another."""
    count = tokens * LAYERS * 2 * HEADS * DIM
    return np.arange(1, count + 1, dtype=np.float32).reshape(tokens, LAYERS, 2, HEADS, DIM)


def fill(layout: KvLayout, blocks: Sequence[int], kv: np.ndarray) -> np.ndarray:
    memory = np.zeros(layout.nbytes, np.uint8)
    held, size = view(memory, layout), layout.block_size
    for token, values in enumerate(kv):
        held[blocks[token // size], :, :, :, token % size] = values[layout.layers.indices][:, :, layout.heads.indices]
    return memory


def tokens_in(memory: np.ndarray, layout: KvLayout, blocks: Sequence[int], count: int) -> np.ndarray:
    held, size = view(memory, layout), layout.block_size
    return np.stack([held[blocks[t // size], :, :, :, t % size] for t in range(count)])


SHAPES = st.tuples(
    st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 3]), st.sampled_from([2, 3, 4]), st.sampled_from(MAKERS)
)


@given(SHAPES, SHAPES, st.data())
@settings(max_examples=40, deadline=None)
def test_any_shape_is_read_into_any_other_in_chunks(source: Any, destination: Any, data: st.DataObject) -> None:
    there, here = layouts(*source), layouts(*destination)
    most = BLOCKS * min(there[0].block_size, here[0].block_size)
    total = data.draw(st.integers(1, most))
    cuts = sorted(data.draw(st.sets(st.integers(1, total), max_size=2)) | {0, total})
    src = data.draw(st.permutations(range(BLOCKS)))
    dst = data.draw(st.permutations(range(BLOCKS)))
    rank = data.draw(st.integers(0, len(here) - 1))
    kv = world(total)
    memories = {f"p/{n}": fill(layout, src, kv) for n, layout in enumerate(there)}
    own = np.zeros(here[rank].nbytes, np.uint8)
    with rig(FakeTransport(memories, own), here, rank) as it:
        it.tell(OpenPeer(1, descriptors(there)))
        for job, (start, stop) in enumerate(pairwise(cuts)):
            it.tell(ReadOrder(job, 1, "r", list(src), list(dst), start, stop, stop == total))
        opened, *ended = it.heard()
    assert opened == PeerOpened(rank, 1)
    assert [(e.job, e.error) for e in ended if isinstance(e, ReadEnded)] == [(n, None) for n in range(len(cuts) - 1)]
    layout = here[rank]
    wanted = kv[:, layout.layers.start : layout.layers.stop, :, layout.heads.start : layout.heads.stop]
    assert np.array_equal(tokens_in(own, layout, dst, total), wanted)


THERE, HERE = layouts(2, 1, 4, block_major), layouts(1, 1, 4, block_major)


@pytest.fixture
def transport() -> FakeTransport:
    kv = world(8)
    return FakeTransport({f"{e}/{n}": fill(la, [0, 1], kv) for e in "pq" for n, la in enumerate(THERE)}, _own())


def _own() -> np.ndarray:
    return np.zeros(HERE[0].nbytes, np.uint8)


@pytest.fixture
def it(transport: FakeTransport) -> Iterator[Rig]:
    with rig(transport, HERE) as made:
        yield made


def read(job: int, session: int = 1, **fields: Any) -> ReadOrder:
    return msgspec.structs.replace(ReadOrder(job, session, "r", [0, 1], [2, 3], 0, 8, True), **fields)


def error_of(reports: Sequence[FromTransferThread]) -> str:
    [report] = reports
    assert isinstance(report, ReadEnded)
    assert report.error is not None
    return report.error


def test_bytes_and_descriptors_are_counted(it: Rig) -> None:
    it.tell(OpenPeer(1, descriptors(THERE)), read(1))
    _, ended = it.heard()
    assert isinstance(ended, ReadEnded)
    assert ended.bytes == 8 * LAYERS * 2 * HEADS * DIM * 4
    assert ended.descriptors == 4  # one for each block and source rank
    assert ended.seconds >= 0


def test_a_read_ends_when_all_sources_have_and_not_before(it: Rig) -> None:
    it.transport.held = True
    it.tell(OpenPeer(1, descriptors(THERE)), read(1))
    it.heard()
    it.transport.waiting[0][1].state = ReadState.DONE
    it.step()
    assert it.heard() == []
    it.transport.held = False
    it.step()
    assert [type(report) for report in it.heard()] == [ReadEnded]


def test_an_error_of_one_source_is_told_once_the_others_have_ended(it: Rig) -> None:
    it.transport.held = True
    it.tell(OpenPeer(1, descriptors(THERE)), read(1))
    it.heard()
    failed = it.transport.waiting.pop(0)[1]
    failed.state, failed.error = ReadState.FAILED, "p/0 is gone"
    it.step()
    assert it.heard() == []
    it.transport.held = False
    it.step()
    assert error_of(it.heard()) == "p/0 is gone"


def test_a_post_that_fails_halfway_waits_for_what_was_posted(it: Rig) -> None:
    it.transport.held = True
    it.transport.fail_posts_after = 1
    it.tell(OpenPeer(1, descriptors(THERE)), read(1))
    assert it.heard() == [PeerOpened(0, 1)]
    it.transport.held = False
    it.step()
    assert error_of(it.heard()) == "p/1 is lost"


def test_a_read_that_fails_while_its_bytes_may_still_arrive_is_reported_at_once_and_quiet_later(it: Rig) -> None:
    it.transport.held = True
    it.tell(OpenPeer(1, descriptors(THERE)), read(1))
    it.heard()
    (_, failing, _), (_, done, _) = it.transport.waiting
    it.transport.waiting.clear()
    failing.state, failing.error = ReadState.FAILING, "connection reset"
    it.step()
    assert it.heard() == []  # the other source is still being read
    done.state = ReadState.DONE
    it.step()
    [ended] = it.heard()
    assert isinstance(ended, ReadEnded)
    assert (ended.error, ended.peer_lost, ended.may_still_write) == ("connection reset", True, True)
    it.step()
    assert it.heard() == []
    failing.state = ReadState.FAILED
    it.step()
    assert it.heard() == [ReadQuiet(0, 1)]
    it.step()
    assert it.heard() == []


def test_closing_a_peer_ends_its_reads(it: Rig) -> None:
    it.transport.held = True
    it.tell(OpenPeer(1, descriptors(THERE)), OpenPeer(2, descriptors(THERE, "q")), read(1), read(2, 2))
    it.heard()
    it.tell(ClosePeer(1))
    assert "disconnected" in error_of(it.heard())
    it.tell(read(3))
    assert "not connected" in error_of(it.heard())
    it.transport.held = False
    it.step()
    [other] = it.heard()
    assert isinstance(other, ReadEnded)
    assert (other.job, other.error) == (2, None)


def test_closing_an_unknown_peer_is_fine(it: Rig) -> None:
    it.tell(ClosePeer(1))
    assert it.heard() == []


def test_a_peer_that_cannot_be_reached_is_let_go_of_wholly(it: Rig) -> None:
    it.transport.refuse = {"p/1"}
    it.tell(OpenPeer(1, descriptors(THERE)))
    assert it.heard() == [PeerOpened(0, 1, "p/1 is not there")]
    assert it.transport.connected == []
    it.transport.refuse.clear()
    it.tell(OpenPeer(1, descriptors(THERE)), read(1))
    assert [getattr(report, "error", "") for report in it.heard()] == [None, None]


def test_a_peer_whose_layout_does_not_fit_is_an_error(it: Rig) -> None:
    it.tell(OpenPeer(1, descriptors(THERE[:1])))
    [opened] = it.heard()
    assert isinstance(opened, PeerOpened)
    assert "holds heads" in (opened.error or "")
    assert it.transport.connected == []


def test_two_names_of_one_engine_do_not_take_its_connections_from_each_other(it: Rig) -> None:
    it.tell(OpenPeer(1, descriptors(THERE)), OpenPeer(2, descriptors(THERE)))
    it.tell(ClosePeer(1))
    it.heard()
    it.tell(read(1, 2))
    [ended] = it.heard()
    assert isinstance(ended, ReadEnded)
    assert ended.error is None
    it.tell(ClosePeer(2))
    assert it.transport.connected == []


@pytest.mark.parametrize(
    "fields",
    [
        {"source_blocks": [0]},
        {"source_blocks": [0, BLOCKS]},
        {"source_blocks": [0, 2**64 - 1]},
        {"destination_blocks": [0]},
        {"destination_blocks": [0, BLOCKS]},
        {"destination_blocks": [1, 1]},
        {"start": 8, "stop": 4},
    ],
)
def test_blocks_that_are_not_there_are_an_error_and_nothing_is_written(it: Rig, fields: dict[str, Any]) -> None:
    it.tell(OpenPeer(1, descriptors(THERE)))
    it.heard()
    it.tell(read(1, **fields))
    assert "KV layout" in error_of(it.heard())
    assert not it.transport.own.any()


def test_orders_that_cannot_be_read_are_dropped(it: Rig) -> None:
    it.tell(b"\xc1", b"", OpenPeer(1, descriptors(THERE)), read(1))
    assert [type(report) for report in it.heard()] == [PeerOpened, ReadEnded]


def test_the_thread_reports_that_it_is_alive_carries_out_orders_and_stops(transport: FakeTransport) -> None:
    died: list[BaseException] = []
    with rig(transport, HERE) as it:
        thread = start_transfer_thread(lambda: it.transfer_thread, "transfer_thread", died.append)
        assert it._reports.decode(it.leader.recv()) == ThreadAlive(0)
        for order in (OpenPeer(1, descriptors(THERE)), read(1), StopThread()):
            it.leader.send(it._reports.encode(order))
        seen: list[type] = []
        while ReadEnded not in seen:
            seen.append(type(it._reports.decode(it.leader.recv())))
        thread.join(10)
        assert not thread.is_alive()
    assert set(seen) <= {ThreadAlive, PeerOpened, ReadEnded}
    assert (died, transport.closed) == ([], 1)


def test_the_end_of_an_engine_that_has_failed_is_the_end_of_the_rank_with_the_reason(transport: FakeTransport) -> None:
    """Its step loop may hang, and then only this thread can say why."""
    died: list[BaseException] = []
    with rig(transport, HERE) as it:
        thread = start_transfer_thread(lambda: it.transfer_thread, "transfer_thread", died.append)
        it.leader.send(it._reports.encode(StopThread("a step has run for 61 s")))
        thread.join(10)
        assert not thread.is_alive()
    [error] = died
    assert isinstance(error, EngineFailed)
    assert str(error) == "the engine has failed: a step has run for 61 s"
    assert transport.closed == 1


def test_a_thread_that_dies_says_why() -> None:
    died: list[BaseException] = []
    told = threading.Event()

    def make() -> TransferThread:
        raise TransferError("no memory to register")

    def failed(error: BaseException) -> None:
        died.append(error)
        told.set()

    start_transfer_thread(make, "transfer_thread", failed)
    assert told.wait(10)
    assert str(died[0]) == "no memory to register"


def test_a_transfer_thread_whose_leader_is_gone_ends_and_closes_its_transport() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    leader = context.socket(zmq.ROUTER)
    port = leader.bind_to_random_port("tcp://127.0.0.1")
    socket = context.socket(zmq.DEALER)
    socket.get_monitor_socket(LEADER_EVENTS)
    socket.connect(f"tcp://127.0.0.1:{port}")
    transport = FakeTransport({}, np.zeros(1, np.uint8))
    transfer_thread = TransferThread(0, [], transport, socket)  # type: ignore[arg-type]
    leader.rcvtimeo = 10_000

    def leave() -> None:
        leader.recv_multipart()
        leader.close(linger=0)

    leaving = threading.Thread(target=leave)
    leaving.start()
    with pytest.raises(EngineFailed, match="the leader of this engine was lost"):
        transfer_thread.run()
    leaving.join()
    assert transport.closed == 1
    context.destroy(linger=0)

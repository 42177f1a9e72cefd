"""Transport in pure Python over ZeroMQ: runs wherever Python runs, for host memory.

Each rank serves its region to peers from one ROUTER socket and reads theirs through one DEALER socket per peer. A read
is fetched piece by piece, a few pieces at a time, so memory is bounded on both sides. This side alone writes into its
memory, in `poll`; once a read has failed or its peer is disconnected nothing of it is written any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from zmq.utils.monitor import parse_monitor_message

from tandem.errors import ConfigError, PeerLost, TransferError, WireError
from tandem.kv.runs import Runs
from tandem.transfer.transports.base import RankEndpoint, ReadState, Region
from tandem.transfer.transports.bounds import runs_inside
from tandem.transfer.transports.tcp.protocol import (
    ADDRESSES,
    ANSWERS,
    FETCHES,
    PIECE_BYTES,
    PIECE_RUNS,
    WINDOW,
    Fetch,
    FetchRefused,
    ServerAddress,
    vector_bytes,
)
from tandem.transfer.transports.tcp.server import Memory, Server, host_memory, scatter
from tandem.wire.keys import ClusterKey
from tandem.wire.sockets import SocketOptions, Sockets

MAX_SOCKETS = 16_384

# libzmq tells a sender what was taken in steps of half the mark, so four windows never fill up for an honest reader.
_HWM = 4 * WINDOW
# With handover, since what the second of one name sends is never read otherwise, and its connection never given back.
_SERVER = SocketOptions(max_message=64 * 1024 + 8192, hwm=_HWM, mandatory=True, handover=True)
# The end of a connection is the end of a peer: a new one would lead to another incarnation of it, or lack answers.
_LOST = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)

_READER = SocketOptions(max_message=PIECE_BYTES, hwm=_HWM, reconnect=False, monitor=_LOST)


class TcpRead:
    """A read in pieces: some wait, some are being fetched. Bytes are written by `fill` alone."""

    def __init__(self, number: int, runs: Runs) -> None:
        self.number = number
        self.error: str | None = None
        self.waiting = deque(enumerate(runs.pieces(PIECE_BYTES, PIECE_RUNS)))
        self.fetching: dict[int, Runs] = {}

    @property
    def state(self) -> ReadState:
        if self.error is not None:
            return ReadState.FAILED
        return ReadState.IN_PROGRESS if self.waiting or self.fetching else ReadState.DONE

    def next_piece(self) -> tuple[int, Runs]:
        """Take a piece that waits; it is being fetched from now on."""
        piece, runs = self.waiting.popleft()
        self.fetching[piece] = runs
        return piece, runs

    def fill(self, piece: int, data: Memory, memory: Memory) -> None:
        """Write a piece. Raises WireError, and writes nothing, if it is not being fetched or has another size."""
        runs = self.fetching.get(piece)
        if runs is None or runs.nbytes != len(data):
            raise WireError(f"piece {piece} of read {self.number} with {len(data)} bytes was not asked for")
        scatter(data, memory, runs.dst_offset, runs.length)
        del self.fetching[piece]


@dataclass(slots=True)
class _Peer:
    endpoint: RankEndpoint
    socket: zmq.Socket[bytes]
    monitor: zmq.Socket[bytes]
    lost: str | None = None
    reads: dict[int, TcpRead] = field(default_factory=dict)

    @property
    def window(self) -> int:
        """Pieces that may be fetched now in addition to those that are."""
        return WINDOW - sum(len(read.fetching) for read in self.reads.values())


@dataclass(frozen=True, slots=True)
class _Registered:
    """This rank's own memory, and the server through which peers read it."""

    endpoint: RankEndpoint
    memory: Memory
    server: Server


class TcpTransport:
    """See `base.Transport`.

    Args:
        agent: unique name of this rank in this incarnation of its engine.
        host: where to serve, and what peers connect to.
        key: the cluster key; None restricts everything to loopback.
    """

    def __init__(self, agent: str, host: str, key: ClusterKey | None = None) -> None:
        self._agent = agent
        self._host = host
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, MAX_SOCKETS)
        self._sockets = Sockets(self._context, key)
        self._poller = zmq.Poller()
        self._own: _Registered | None = None
        self._peers: dict[str, _Peer] = {}
        self._reads = 0

    def register(self, region: Region) -> None:
        if self._own is not None:
            raise TransferError("memory is registered already")
        memory = host_memory(region)
        listener, port = self._sockets.bind(zmq.ROUTER, self._host, 0, _SERVER)
        self._poller.register(listener, zmq.POLLIN)
        endpoint = RankEndpoint(self._agent, ADDRESSES.encode(ServerAddress(self._host, port)), region)
        self._own = _Registered(endpoint, memory, Server(self._agent, memory, listener))

    def describe(self) -> RankEndpoint:
        return self._registered().endpoint

    def connect(self, peer: RankEndpoint) -> None:
        """Connect in the background: a peer that is not there is noticed within seconds, and its reads fail."""
        self._registered()
        known = self._peers.get(peer.agent)
        if known is not None:
            if known.endpoint != peer or known.lost is not None:
                raise TransferError(f"{peer.agent} is connected already; disconnect it first")
            return
        try:
            address = ADDRESSES.decode(peer.metadata)
            socket = self._sockets.connect(zmq.DEALER, address.host, address.port, _READER)
        except (WireError, ConfigError) as error:
            raise TransferError(f"cannot connect to {peer.agent}: {error}") from error
        monitor = socket.get_monitor_socket()
        self._peers[peer.agent] = _Peer(peer, socket, monitor)
        self._poller.register(socket, zmq.POLLIN)
        self._poller.register(monitor, zmq.POLLIN)

    def disconnect(self, agent: str) -> None:
        peer = self._peers.pop(agent, None)
        if peer is None:
            return
        self._lose(peer, f"disconnected from {agent}")

    def post(self, agent: str, runs: Runs) -> TcpRead:
        own = self._registered()
        peer = self._peers.get(agent)
        if peer is None:
            raise TransferError(f"{agent} is not connected")
        if peer.lost is not None:
            raise PeerLost(f"{agent} is lost: {peer.lost}")
        self._reads += 1
        read = TcpRead(self._reads, runs_inside(runs, peer.endpoint.region, own.endpoint.region))
        if read.state is ReadState.IN_PROGRESS:
            peer.reads[read.number] = read
            self._fetch(peer)
        return read

    def poll(self) -> None:
        ready = dict(self._poller.poll(0))
        if self._own is not None and self._own.server.socket in ready:
            self._own.server.poll()
        for peer in list(self._peers.values()):
            if peer.socket in ready:
                self._receive(peer)
            if peer.monitor in ready and peer.lost is None:
                self._notice_loss(peer)

    def wait_on(self) -> Sequence[Any]:
        """Return sockets; they change with `connect` and `disconnect`, and when a peer is lost."""
        return [socket for socket, _ in self._poller.sockets]

    def close(self) -> None:
        for agent in list(self._peers):
            self.disconnect(agent)
        self._own = None
        self._poller = zmq.Poller()
        # Waits until libzmq sends nothing out of the region any more.
        self._context.destroy(linger=0)

    # --- progress of reads ----------------------------------------------------------------------------------

    def _fetch(self, peer: _Peer) -> None:
        """Ask for the next pieces, oldest read first, until the window is full."""
        window = peer.window
        for read in peer.reads.values():
            while read.waiting:
                if window <= 0:
                    return
                piece, runs = read.next_piece()
                offsets, lengths = vector_bytes(runs.src_offset), vector_bytes(runs.length)
                fetch = Fetch(peer.endpoint.agent, read.number, piece, offsets, lengths)
                try:
                    peer.socket.send(FETCHES.encode(fetch), zmq.NOBLOCK)
                except zmq.ZMQError as error:
                    self._lose(peer, f"cannot send to {peer.endpoint.agent}: {error}")
                    return
                window -= 1

    def _receive(self, peer: _Peer) -> None:
        for _ in range(WINDOW):
            if peer.lost is not None:
                return
            try:
                frames = peer.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            try:
                self._accept(peer, frames)
            except WireError as error:
                self._lose(peer, f"{peer.endpoint.agent} sent a message that is no answer: {error}")
            self._fetch(peer)

    def _accept(self, peer: _Peer, frames: Sequence[zmq.Frame]) -> None:
        """Take an answer. Raises WireError for anything that was not asked for."""
        answer = ANSWERS.decode(frames[0].buffer)
        if answer.source != peer.endpoint.agent:
            raise WireError(f"it is {answer.source}")
        if isinstance(answer, FetchRefused):
            self._lose(peer, f"{peer.endpoint.agent} refuses to be read: {answer.reason}")
            return
        read = peer.reads.get(answer.read)
        if read is None or len(frames) != 2:
            raise WireError(f"a piece of read {answer.read} in {len(frames)} frames was not asked for")
        read.fill(answer.piece, np.frombuffer(frames[1].buffer, np.uint8), self._registered().memory)
        if read.state is ReadState.DONE:
            del peer.reads[read.number]

    def _notice_loss(self, peer: _Peer) -> None:
        event = parse_monitor_message(peer.monitor.recv_multipart())
        name = str(zmq.Event(event["event"]).name).replace("_", " ").lower()
        self._lose(peer, f"connection to {peer.endpoint.agent}: {name}")

    def _lose(self, peer: _Peer, reason: str) -> None:
        """Fail its reads and hang up: what still comes from it would pile up where nobody reads it."""
        if peer.lost is not None:
            return
        peer.lost = reason
        self._poller.unregister(peer.socket)
        self._poller.unregister(peer.monitor)
        peer.socket.disable_monitor()
        peer.monitor.close(linger=0)
        peer.socket.close(linger=0)
        for read in peer.reads.values():
            read.error = reason
        peer.reads.clear()

    def _registered(self) -> _Registered:
        if self._own is None:
            raise TransferError("no memory is registered, or the transport is closed")
        return self._own

"""The sockets on which the leader listens, bound before any other rank or engine hears of them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from tandem.engine.step.pipeline import LEADER_SOCKET, follower_socket
from tandem.transfer.prefill.listener import MAX_PEER_MESSAGE, MAX_PEER_MESSAGES
from tandem.transfer.thread.transfer_thread import LEADER_EVENTS
from tandem.wire.keys import ClusterKey, new_key
from tandem.wire.messages import Address
from tandem.wire.sockets import SocketOptions, Sockets

INSIDE = "inproc://transfer_threads"


class LeaderAddresses(msgspec.Struct, frozen=True):
    """Addresses at which the leader listens: for its followers, for transfer threads, and for decode engines.

    Attributes:
        engine_key: secret of this life of the engine, which the leader makes where there is no cluster key: nobody else
            on the machine is to pass for one of the ranks. It travels over the world group alone.
    """

    step: Address
    transfer: Address
    peer: Address
    engine_key: bytes | None = None

    def __repr__(self) -> str:
        return f"LeaderAddresses(step={self.step}, transfer={self.transfer}, peer={self.peer})"


@dataclass(frozen=True, slots=True)
class LeaderSockets:
    """`step` belongs to the step loop; the others, and what `event_loop` makes, to the event loop."""

    step: zmq.Socket[bytes]
    transfer: zmq.asyncio.Socket
    peer: zmq.asyncio.Socket
    event_loop: Sockets[zmq.asyncio.Socket]
    addresses: LeaderAddresses

    @classmethod
    def bind(cls, host: str, context: zmq.Context[zmq.Socket[bytes]], key: ClusterKey | None) -> LeaderSockets:
        """Bind all of them to free ports of `host`.

        Args:
            context: of the step loop's sockets.
            key: the cluster key.
        """
        engine_key = key or new_key()
        asynchronous = zmq.asyncio.Context()
        transfer_options = SocketOptions(handover=True, patient=True)
        step, step_port = Sockets(context, engine_key).bind(zmq.ROUTER, host, 0, LEADER_SOCKET)
        transfer, transfer_port = Sockets(asynchronous, engine_key).bind(zmq.ROUTER, host, 0, transfer_options)
        transfer.bind(INSIDE)
        event_loop: Sockets[zmq.asyncio.Socket] = Sockets(asynchronous, key)
        peers = SocketOptions(handover=True, max_message=MAX_PEER_MESSAGE, hwm=MAX_PEER_MESSAGES)
        peer, peer_port = event_loop.bind(zmq.ROUTER, host, 0, peers)
        addresses = LeaderAddresses(
            Address(host, step_port),
            Address(host, transfer_port),
            Address(host, peer_port),
            None if key is not None else engine_key.secret,
        )
        return cls(step, transfer, peer, event_loop, addresses)

    def connect_transfer_thread(self) -> zmq.Socket[bytes]:
        """Return the socket of the leader's own transfer thread. It stays within the process: nothing can cut it."""
        inside: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(self.transfer.context.underlying)
        socket = inside.socket(zmq.DEALER)
        socket.set(zmq.IDENTITY, b"0")
        socket.set(zmq.LINGER, 0)
        socket.connect(INSIDE)
        return socket


class FollowerSockets:
    """The connections of another rank to its leader.

    Args:
        key: the cluster key; without one the engine's own is used.
    """

    def __init__(
        self, rank: int, context: zmq.Context[zmq.Socket[bytes]], key: ClusterKey | None, leader: LeaderAddresses
    ) -> None:
        own = ClusterKey(leader.engine_key) if leader.engine_key is not None else None
        self._sockets = Sockets(context, key or own)
        self._rank = rank
        self._leader = leader

    def connect_step(self) -> zmq.Socket[bytes]:
        """Return the socket on which batches come."""
        address = self._leader.step
        return self._sockets.connect(zmq.DEALER, address.host, address.port, follower_socket(self._rank))

    def connect_transfer_thread(self) -> zmq.Socket[bytes]:
        """Return the socket of this rank's transfer thread."""
        address = self._leader.transfer
        options = SocketOptions(identity=b"%d" % self._rank, patient=True, monitor=LEADER_EVENTS)
        return self._sockets.connect(zmq.DEALER, address.host, address.port, options)

"""The sockets on which the leader listens, bound before any other rank or engine hears of them."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import zmq
import zmq.asyncio

from tandem.engine.step.pipeline import LEADER_SOCKET
from tandem.transfer.prefill.listener import MAX_PEER_MESSAGE, MAX_PEER_MESSAGES
from tandem.wire.keys import ClusterKey
from tandem.wire.messages import Address
from tandem.wire.sockets import SocketOptions, Sockets


class LeaderAddresses(msgspec.Struct, frozen=True):
    """Addresses at which the leader listens: for its followers, for transfer threads, and for decode engines."""

    step: Address
    transfer: Address
    peer: Address


@dataclass(frozen=True, slots=True)
class LeaderSockets:
    """`step` belongs to the step loop; the others, and what `event_loop` makes, to the event loop."""

    step: zmq.Socket[bytes]
    transfer: zmq.asyncio.Socket
    peer: zmq.asyncio.Socket
    event_loop: Sockets[zmq.asyncio.Socket]
    addresses: LeaderAddresses

    @classmethod
    def bind(cls, host: str, step_loop: Sockets[zmq.Socket[bytes]], key: ClusterKey | None) -> LeaderSockets:
        """Bind all of them to free ports of `host`."""
        event_loop: Sockets[zmq.asyncio.Socket] = Sockets(zmq.asyncio.Context(), key)
        options = SocketOptions(handover=True)
        step, step_port = step_loop.bind(zmq.ROUTER, host, 0, LEADER_SOCKET)
        transfer, transfer_port = event_loop.bind(zmq.ROUTER, host, 0, options)
        peers = SocketOptions(handover=True, max_message=MAX_PEER_MESSAGE, hwm=MAX_PEER_MESSAGES)
        peer, peer_port = event_loop.bind(zmq.ROUTER, host, 0, peers)
        addresses = LeaderAddresses(Address(host, step_port), Address(host, transfer_port), Address(host, peer_port))
        return cls(step, transfer, peer, event_loop, addresses)

"""Knocking: pings over the sockets that engines use among themselves, with the same encryption and range of ports.

Done before the ranks form a process group: that connects everybody with everybody, and where only one pair cannot, it
says so late and not on all nodes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

import msgspec
import zmq

from tandem.doctor.cluster_messages import NodeDoor, Reach
from tandem.errors import ConfigError
from tandem.wire.keys import ClusterKey
from tandem.wire.sockets import SocketOptions, Sockets

PING_SECONDS = 5.0
ROUND_TRIPS = 5
_OPTIONS = SocketOptions(max_message=1024, hwm=64)


class Door:
    """Answers pings, from a thread of its own, until it is closed.

    Raises ConfigError where engines could not listen either: another machine's address, no cluster key.
    """

    def __init__(self, host: str, key: ClusterKey | None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets = Sockets(self._context, key)
        self._listener, self.port = self.sockets.bind(zmq.ROUTER, host, 0, _OPTIONS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _answer(self) -> None:
        while not self._closing.is_set():
            if self._listener.poll(100):
                with contextlib.suppress(zmq.ZMQError):  # whoever knocked is gone
                    self._listener.send_multipart(self._listener.recv_multipart(), zmq.NOBLOCK)
        self._listener.close()


def knock(door: Door, own: int, doors: Sequence[NodeDoor]) -> list[Reach]:
    """How this node reaches the doors of all others; takes little more than PING_SECONDS however many do not answer."""
    found = {other.node: Reach(own, other.node) for other in doors if other.node != own}
    with contextlib.ExitStack() as stack:
        sockets: dict[int, zmq.Socket[bytes]] = {}
        for other in doors:
            if other.node == own:
                continue
            try:
                sockets[other.node] = stack.enter_context(_connect(door, other))
            except ConfigError as error:
                found[other.node] = Reach(own, other.node, error=str(error), step="connection")
        for node in _answering(sockets):
            found[node] = Reach(own, node, ping=_round_trip(sockets[node]))
    return [_explained(reach, doors) for reach in found.values()]


def _connect(door: Door, other: NodeDoor) -> zmq.Socket[bytes]:
    if other.port is None:
        raise ConfigError(f"{other} does not listen")
    return door.sockets.connect(zmq.DEALER, other.host, other.port, _OPTIONS)


def _answering(sockets: dict[int, zmq.Socket[bytes]]) -> Iterator[int]:
    """Those that answer a first ping in time; connecting and encrypting are part of it."""
    poller = zmq.Poller()
    waiting = {}
    for node, socket in sockets.items():
        socket.send(b"ping")
        poller.register(socket, zmq.POLLIN)
        waiting[socket] = node
    deadline = time.monotonic() + PING_SECONDS
    while waiting and (left := deadline - time.monotonic()) > 0:
        for socket, _ in poller.poll(int(left * 1000) + 1):
            poller.unregister(socket)
            socket.recv()
            yield waiting.pop(socket)


def _round_trip(socket: zmq.Socket[bytes]) -> float | None:
    """The shortest of some; None if one does not come back."""
    shortest = PING_SECONDS
    for _ in range(ROUND_TRIPS):
        started = time.monotonic()
        socket.send(b"ping")
        if not socket.poll(int(PING_SECONDS * 1000)):
            return None
        socket.recv()
        shortest = min(shortest, time.monotonic() - started)
    return shortest


def _explained(reach: Reach, doors: Sequence[NodeDoor]) -> Reach:
    if reach.ping is not None or reach.error is not None:
        return reach
    other = doors[reach.source]
    words = f"no answer from {other.host}:{other.port} in {PING_SECONDS:.0f} s"
    return msgspec.structs.replace(reach, error=words, step="connection")

"""Pings over the sockets that engines use among themselves, with the same encryption and range of ports.

Sent before the ranks form a process group: that connects everybody with everybody, and where only one pair cannot, it
says so late and not on all nodes.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Collection, Iterator, Sequence

import zmq

from tandem.doctor.links import Link, NodeInfo, Step
from tandem.errors import ConfigError
from tandem.wire.keys import ClusterKey
from tandem.wire.sockets import SocketOptions, Sockets

PING_SECONDS = 5.0
ROUND_TRIPS = 5
_OPTIONS = SocketOptions(max_message=1024, hwm=64)

Socket = zmq.Socket[bytes]


class PingServer:
    """Answers pings, from a thread of its own, until it is closed.

    Raises ConfigError where engines could not listen either: another machine's address, no cluster key.
    """

    def __init__(self, host: str, key: ClusterKey | None) -> None:
        self._context: zmq.Context[Socket] = zmq.Context()
        self._sockets = Sockets(self._context, key)
        self._listener, self.port = self._sockets.bind(zmq.ROUTER, host, 0, _OPTIONS)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._answer, name="ping server", daemon=True)
        self._thread.start()

    def connect(self, node: NodeInfo) -> Socket:
        """Return a socket to the ping server of another node. Raises ConfigError."""
        if node.port is None:
            raise ConfigError(f"{node} does not listen")
        return self._sockets.connect(zmq.DEALER, node.host, node.port, _OPTIONS)

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        self._context.destroy(linger=0)

    def _answer(self) -> None:
        while not self._closing.is_set():
            if self._listener.poll(100):
                with contextlib.suppress(zmq.ZMQError):  # the sender is gone
                    self._listener.send_multipart(self._listener.recv_multipart(), zmq.NOBLOCK)
        self._listener.close()


def ping_all(server: PingServer | None, here: NodeInfo, nodes: Sequence[NodeInfo]) -> list[Link]:
    """Return the links to all other nodes; takes little more than PING_SECONDS however many do not answer.

    Args:
        server: of this node, whose sockets are used; None if it could not start.
    """
    own, others = here.number, [node for node in nodes if node.number != here.number]
    if server is None:
        return [Link(own, node.number).failure(Step.START, f"{here} does not listen") for node in others]
    links = {}
    with contextlib.ExitStack() as stack:
        sockets: dict[Socket, int] = {}
        for node in others:
            error = f"no answer from {node.host}:{node.port} in {PING_SECONDS:.0f} s"
            try:
                sockets[stack.enter_context(server.connect(node))] = node.number
            except ConfigError as config_error:
                error = str(config_error)
            links[node.number] = Link(own, node.number).failure(Step.CONNECTION, error)
        for socket in _answering(sockets):
            if (seconds := _round_trip(socket)) is not None:
                links[sockets[socket]] = Link(own, sockets[socket], ping=seconds)
    return list(links.values())


def _answering(sockets: Collection[Socket]) -> Iterator[Socket]:
    """Yield those that answer a first ping in time; connecting and encrypting are part of it."""
    poller = zmq.Poller()
    for socket in sockets:
        socket.send(b"ping")
        poller.register(socket, zmq.POLLIN)
    deadline = time.monotonic() + PING_SECONDS
    while poller.sockets and (left := deadline - time.monotonic()) > 0:
        for socket, _ in poller.poll(int(left * 1000) + 1):
            poller.unregister(socket)
            socket.recv()
            yield socket


def _round_trip(socket: Socket) -> float | None:
    """Return the seconds of the shortest of some; None if one does not come back."""
    shortest = PING_SECONDS
    for _ in range(ROUND_TRIPS):
        started = time.monotonic()
        socket.send(b"ping")
        if not socket.poll(int(PING_SECONDS * 1000)):
            return None
        socket.recv()
        shortest = min(shortest, time.monotonic() - started)
    return shortest

"""Sockets of simulated processes, with the methods of ZeroMQ's that are used."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from tandem.wire.messages import Address
from tandem.wire.sockets import DEFAULT_OPTIONS, SocketOptions
from tests.simulator.network import Connection, Frames, Network
from tests.simulator.world import Process

RECONNECT_SECONDS = 0.1
MAX_RECONNECT_SECONDS = 2.0


class Socket:
    """A ROUTER or DEALER with the methods of `zmq.asyncio.Socket` that are used, and of `zmq.Socket` for threads.

    Attributes:
        on_message: called, in the process, when a message is there.
    """

    def __init__(
        self, network: Network, process: Process, kind: int, identity: bytes = b"", *, duplicates: bool = False
    ) -> None:
        self.network = network
        self.process = process
        self.type = kind
        self.identity = identity
        self.closed = False
        self.on_message: Callable[[], None] = lambda: None
        self._duplicates = duplicates
        self._inbox: deque[Frames] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._by_identity: dict[bytes, Connection] = {}
        self._connection: Connection | None = None
        self._outbox: deque[Frames] = deque()
        self._recent: deque[Frames] = deque(maxlen=3)
        self._address: Address | None = None
        self._tries = 0
        self._monitor: Monitor | None = None

    # --- as a program sees it ------------------------------------------------------------------------------------

    def send(self, data: bytes, flags: int = 0) -> asyncio.Future[None]:
        return self.send_multipart([data], flags)

    def send_multipart(self, frames: Sequence[bytes], flags: int = 0) -> asyncio.Future[None]:
        if self.closed or self.process.dead:
            return self.process.sent
        if self.type == zmq.ROUTER:
            connection = self._by_identity.get(frames[0])
            if connection is not None:
                connection.send(self, list(frames[1:]))
        elif self._connection is not None:
            self._recent.append(list(frames))
            self._connection.send(self, list(frames))
        else:
            self._outbox.append(list(frames))
        return self.process.sent

    async def recv_multipart(self) -> Frames:
        while not self._inbox:
            self._waiter = self.process.world.loop.create_future()
            await self._waiter
        return self._inbox.popleft()

    def recv(self, flags: int = 0) -> bytes:
        """Return a frame, without waiting."""
        if not self._inbox:
            raise zmq.Again
        return self._inbox.popleft()[0]

    def get_monitor_socket(self, events: int = 0) -> Monitor:
        if self._monitor is None:
            self._monitor = Monitor(self.process)
        return self._monitor

    def disable_monitor(self) -> None:
        self._monitor = None

    def close(self, linger: int | None = None) -> None:
        if self.closed:
            return
        self.closed = True
        connections = list(self._by_identity.values())
        if self._connection is not None:
            connections.append(self._connection)
        for connection in connections:
            connection.finish(self)
        for address in [address for address, socket in self.network.bound.items() if socket is self]:
            del self.network.bound[address]

    # --- as the network sees it ----------------------------------------------------------------------------------

    def connect(self, address: Address) -> None:
        self._address = address
        self.network.world.after(self.network.delay(), self._dial, self.process)

    def _dial(self) -> None:
        if self.closed or self._address is None:
            return
        server, network = self.network.bound.get(self._address), self.network
        reachable = server is not None and not server.process.paused
        if server is None or not reachable or network.is_cut(self.process, server.process):
            self._tries += 1
            wait = min(RECONNECT_SECONDS * 2**self._tries, MAX_RECONNECT_SECONDS)
            network.world.after(wait * network.world.random.random(), self._dial, self.process)
            return
        self._tries = 0
        connection = Connection(network, self, server)
        network.connections.append(connection)
        server.accepted(connection, self.identity)
        self._connection = connection
        repeated: list[Frames] = []
        if self._duplicates and self._recent and network.world.chance(network.duplicates):
            repeated = list(self._recent)
        waiting, self._outbox = self._outbox, deque()
        for frames in [*repeated, *waiting]:
            self.send_multipart(frames)

    def accepted(self, connection: Connection, identity: bytes) -> None:
        """A peer has connected; one of the same identity is replaced."""
        earlier = self._by_identity.pop(identity, None)
        self._by_identity[identity] = connection
        if earlier is not None:
            earlier.finish(self)

    def arrived(self, connection: Connection, frames: Frames) -> None:
        if self.type == zmq.ROUTER:
            if self._by_identity.get(connection.client.identity) is not connection:
                return
            frames = [connection.client.identity, *frames]
        self._inbox.append(frames)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self.on_message()

    def disconnected(self, connection: Connection) -> None:
        if self.type == zmq.ROUTER:
            if self._by_identity.get(connection.client.identity) is connection:
                del self._by_identity[connection.client.identity]
        elif self._connection is connection:
            self._connection = None
            if self._monitor is not None:
                self._monitor.put()
            if not self.closed:
                self.network.world.after(RECONNECT_SECONDS, self._dial, self.process)


class Monitor:
    """Tells of every connection that ended."""

    def __init__(self, process: Process) -> None:
        self._events: asyncio.Queue[None] = asyncio.Queue()
        self._process = process

    def put(self) -> None:
        self._events.put_nowait(None)

    async def recv_multipart(self) -> Frames:
        await self._events.get()
        return [b"disconnected"]

    def poll(self, timeout: int = 0) -> int:
        return 0


class Sockets:
    """Makes sockets of one process, as `tandem.wire.sockets.Sockets` does."""

    def __init__(self, network: Network, process: Process) -> None:
        self._network = network
        self._process = process

    def bind(self, address: Address) -> Any:
        socket = self._network.bound[address] = Socket(self._network, self._process, zmq.ROUTER)
        return socket

    def connect(self, kind: int, host: str, port: int, options: SocketOptions = DEFAULT_OPTIONS) -> Any:
        identity = options.identity or b""
        socket = Socket(self._network, self._process, kind, identity, duplicates=b"/" in identity)
        socket.connect(Address(host, port))
        return socket

"""Sockets of simulated processes, with the methods of ZeroMQ's that are used."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import zmq

from tandem.router.connection_monitor import ConnectionMonitor
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
        self._inbox: deque[tuple[Frames, int]] = deque()
        self._numbers: dict[Connection, int] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._by_identity: dict[bytes, Connection] = {}
        self._connection: Connection | None = None
        self._outbox: deque[Frames] = deque()
        self._recent: deque[Frames] = deque(maxlen=3)
        self._address: Address | None = None
        self._tries = 0
        self._monitor: Monitor | None = None

    # --- as a program sees it ------------------------------------------------------------------------------------

    def get(self, option: int) -> int:
        assert option == zmq.EVENTS
        return zmq.POLLIN if self._inbox else 0

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

    async def recv_multipart(self, flags: int = 0, copy: bool = True) -> Any:
        while not self._inbox:
            self._waiter = self.process.world.loop.create_future()
            await self._waiter
        frames, number = self._inbox.popleft()
        return frames if copy else [Frame(data, number) for data in frames]

    def recv(self, flags: int = 0) -> bytes:
        """Return a frame, without waiting."""
        if not self._inbox:
            raise zmq.Again
        return self._inbox.popleft()[0][0]

    def get_monitor_socket(self, events: int = 0) -> Monitor:
        if self._monitor is None:
            self._monitor = Monitor(self.process)
        return self._monitor

    def _tell(self, event: int, number: int) -> None:
        if self._monitor is not None:
            self.process.post(functools.partial(self._monitor.put, event, number))

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
        if earlier is not None:  # of which a monitor is not told
            self._numbers.pop(earlier, None)
            earlier.finish(self)
        used = set(self._numbers.values())
        number = self._numbers[connection] = next(one for one in itertools.count(10) if one not in used)
        self._tell(zmq.EVENT_ACCEPTED, number)

    def arrived(self, connection: Connection, frames: Frames) -> None:
        if self.type == zmq.ROUTER:
            if self._by_identity.get(connection.client.identity) is not connection:
                return
            frames = [connection.client.identity, *frames]
        self._inbox.append((frames, self._numbers.get(connection, 0)))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self.on_message()

    def disconnected(self, connection: Connection) -> None:
        if self.type == zmq.ROUTER:
            if self._by_identity.get(connection.client.identity) is connection:
                del self._by_identity[connection.client.identity]
            if connection in self._numbers:
                self._tell(zmq.EVENT_DISCONNECTED, self._numbers.pop(connection))
        elif self._connection is connection:
            self._connection = None
            self._tell(zmq.EVENT_DISCONNECTED, 0)
            if not self.closed:
                self.network.world.after(RECONNECT_SECONDS, self._dial, self.process)


class Frame:
    """A part of a message that was received without a copy."""

    def __init__(self, data: bytes, number: int) -> None:
        self.bytes = data
        self._number = number

    def get(self, option: int) -> int:
        """Return the number of the connection (`zmq.SRCFD`)."""
        return self._number


class Monitor:
    """Tells of connections that begin and end, in the messages that libzmq tells it with.

    Attributes:
        on_event: called, in the process, when there is one.
    """

    def __init__(self, process: Process) -> None:
        self._events: deque[Frames] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._process = process
        self.on_event: Callable[[], object] = lambda: None

    def put(self, event: int, number: int) -> None:
        self._events.append([struct.pack("=hi", event, number), b"address"])
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        self.on_event()

    async def recv_multipart(self) -> Frames:
        while not self._events:
            self._waiter = self._process.world.loop.create_future()
            await self._waiter
        return self._events.popleft()

    def take(self, flags: int = 0) -> Frames:
        """Return an event, without waiting."""
        if not self._events:
            raise zmq.Again
        return self._events.popleft()

    def poll(self, timeout: int = 0) -> int:
        return 0


class SimConnectionMonitor(ConnectionMonitor):
    """Reads its events from a simulated socket; all else is as in a router."""

    def __init__(self, socket: Any, on_lost: Callable[[bytes], None]) -> None:
        monitor: Any = socket.get_monitor_socket()
        self._socket = socket
        self._events = monitor
        self._monitor = _NoWait(monitor)  # type: ignore[assignment]
        self._on_lost = on_lost
        self._open: set[int] = set()
        self._engines: dict[int, bytes] = {}
        self._connections: dict[bytes, int] = {}
        self._ended: list[bytes] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self._events.on_event = self._read
        self._read()
        yield


class _NoWait:
    """A monitor as `zmq.Socket`, which does not wait."""

    def __init__(self, monitor: Monitor) -> None:
        self.recv_multipart = monitor.take


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

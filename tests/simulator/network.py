"""The network: connections as ZeroMQ over TCP has them, links that are slow or cut, and sockets for both.

Within a connection nothing overtakes; between connections anything may. A connection that breaks loses what is under way.
The side that dialled connects again, and sends what it kept meanwhile; with `duplicates` also, now and then, what it had
sent just before: TCP does not do so, the protocol between engines has to bear it all the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from tandem.wire.messages import Address
from tandem.wire.sockets import DEFAULT_OPTIONS, SocketOptions
from tests.simulator.world import Process, World

Frames = list[bytes]

HEARTBEAT_SECONDS = (6.0, 8.0)
"""ZeroMQ takes a peer for lost after the first, and at the latest after the second of these."""
RECONNECT_SECONDS = 0.1
MAX_RECONNECT_SECONDS = 2.0
LATE_SECONDS = 0.4
"""Now and then a packet is lost and sent again."""


class Network:
    """Addresses, connections and cuts.

    Args:
        slowest: seconds that a message usually takes at most.
        spikes: probability that one takes much longer.
        duplicates: probability that a connection between engines that comes back repeats messages.
    """

    def __init__(self, world: World, slowest: float, spikes: float, duplicates: float) -> None:
        self.world = world
        self._slowest = slowest
        self._spikes = spikes
        self.duplicates = duplicates
        self.bound: dict[Address, Socket] = {}
        self.connections: list[Connection] = []
        self._cuts: dict[frozenset[str], int] = {}
        self._cut_number = 0

    def delay(self) -> float:
        world = self.world
        seconds = world.wait(0.00005, self._slowest)
        return seconds + world.random.random() * LATE_SECONDS if world.chance(self._spikes) else seconds

    def is_cut(self, one: Process, other: Process) -> bool:
        return bool(self._cuts) and frozenset((one.name, other.name)) in self._cuts

    def cut(self, one: str, other: str) -> None:
        """Let nothing through between two processes."""
        self._cut_number += 1
        pair, number = frozenset((one, other)), self._cut_number
        self._cuts[pair] = number
        for connection in self.connections:
            if connection.pair == pair:
                for end in connection.ends:
                    self._time_out(connection, end, lambda: self._cuts.get(pair) == number)

    def heal(self, one: str, other: str) -> None:
        pair = frozenset((one, other))
        if self._cuts.pop(pair, None) is not None:
            for connection in list(self.connections):
                if connection.pair == pair:
                    connection.release_held()

    def pause(self, process: Process) -> None:
        """The process does not answer heartbeats while it is paused."""
        process.pause()
        number = process.pauses
        for connection in self.connections:
            for end in connection.ends:
                if process.name in connection.pair and end.process is not process:
                    self._time_out(connection, end, lambda: process.paused and process.pauses == number)

    def _time_out(self, connection: Connection, end: Socket, still: Callable[[], bool]) -> None:
        def check() -> None:
            if still() and connection in self.connections:
                connection.lose()

        self.world.after(self.world.random.uniform(*HEARTBEAT_SECONDS), check, end.process)

    def kill(self, process: Process) -> None:
        """The process ends: its machine closes its connections."""
        process.kill()
        for address in [address for address, socket in self.bound.items() if socket.process is process]:
            del self.bound[address]
        for connection in list(self.connections):
            for end in connection.ends:
                if end.process is process:
                    connection.finish(end)

    def break_connections(self, one: str, other: str) -> None:
        """Break everything between two processes, as a firewall does that forgets its state."""
        for connection in list(self.connections):
            if connection.pair == frozenset((one, other)):
                connection.lose()


class Connection:
    """One TCP connection. `client` dialled.

    Messages in a direction arrive in order; those that arrive while the link is cut are held until it heals.
    """

    def __init__(self, network: Network, client: Socket, server: Socket) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.ends = (client, server)
        self.pair = frozenset((client.process.name, server.process.name))
        self.lost = False
        self._open = {id(client), id(server)}
        self._latest = {id(client): 0.0, id(server): 0.0}
        self._held: list[tuple[Socket, Frames | None]] = []
        self._dropped: set[int] = set()
        self._last_sent: tuple[float, int] = (-1.0, 0)
        self._number = 0

    def other(self, end: Socket) -> Socket:
        return self.server if end is self.client else self.client

    def send(self, sender: Socket, frames: Frames | None) -> None:
        """Send to the other end; None ends the connection."""
        world, receiver = self.network.world, self.other(sender)
        self._number += 1
        number = self._number
        if frames is not None:
            self._last_sent = (world.now, number)
        arrival = max(self._latest[id(receiver)], world.now + self.network.delay())
        self._latest[id(receiver)] = arrival
        world.at(arrival, lambda: None if number in self._dropped else self._arrive(receiver, frames))

    def _arrive(self, receiver: Socket, frames: Frames | None) -> None:
        if self.lost:
            return
        if self._held or self.network.is_cut(self.client.process, self.server.process):
            self._held.append((receiver, frames))
            return
        receiver.process.run(lambda: self._received(receiver, frames))

    def _received(self, receiver: Socket, frames: Frames | None) -> None:
        if self.lost or id(receiver) not in self._open:
            return
        if frames is None:
            self._close(receiver)
        elif not receiver.closed:
            if self.network.world.verbose:
                self.network.world.note_message(self.other(receiver).process.name, frames[-1])
            receiver.arrived(self, frames)

    def release_held(self) -> None:
        held, self._held = self._held, []
        for receiver, frames in held:
            arrival = max(self._latest[id(receiver)], self.network.world.now + self.network.delay())
            self._latest[id(receiver)] = arrival
            self.network.world.at(arrival, lambda r=receiver, f=frames: self._arrive(r, f))  # type: ignore[misc]

    def finish(self, end: Socket) -> None:
        """This end is closed; the other one hears of it after what was sent before."""
        self._open.discard(id(end))
        if end.process.dead or not self._open:
            pass
        elif self._last_sent[0] == self.network.world.now and self.network.world.chance(0.5):
            self._dropped.add(self._last_sent[1])  # closed without lingering: the last message may be lost
        if self._open:
            self.send(end, None)
        else:
            self._forget()

    def lose(self) -> None:
        """Both ends hear of it, each when it can; what is under way is lost."""
        if self.lost:
            return
        self.lost = True
        self._forget()
        for end in self.ends:
            if id(end) in self._open:
                delay = self.network.delay()
                self.network.world.after(delay, lambda e=end: self._close(e), end.process)  # type: ignore[misc]

    def _close(self, end: Socket) -> None:
        if id(end) in self._open:
            self._open.discard(id(end))
            self._forget()
            end.disconnected(self)

    def _forget(self) -> None:
        if self in self.network.connections:
            self.network.connections.remove(self)


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

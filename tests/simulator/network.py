"""The network: connections as ZeroMQ over TCP has them, and links that are slow or cut.

Within a connection nothing overtakes; between connections anything may. A connection that breaks loses what is under
way. The side that dialled connects again, and sends what it kept meanwhile; with `duplicates` also, now and then, what
it had sent just before: TCP does not do so, the protocol between engines has to bear it all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tandem.wire.messages import Address
from tests.simulator.world import Process, World

Frames = list[bytes]

GONE_SECONDS = (6.0, 8.0)
"""The kernels give up a machine that does not answer after the first, and at the latest after the second of these."""
LATE_SECONDS = 0.4
"""Now and then a packet is lost and sent again."""


class End(Protocol):
    """A socket, as the network sees it."""

    process: Process
    identity: bytes
    closed: bool

    def accepted(self, connection: Connection, identity: bytes) -> None:
        """A peer has connected."""

    def arrived(self, connection: Connection, frames: Frames) -> None:
        """A message is there."""

    def disconnected(self, connection: Connection) -> None:
        """A connection has ended, and not by this end."""


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
        self.spikes = spikes
        self.duplicates = duplicates
        self.bound: dict[Address, End] = {}
        self.connections: list[Connection] = []
        self._cuts: dict[frozenset[str], int] = {}
        self._cut_number = 0

    def delay(self) -> float:
        world = self.world
        seconds = world.wait(0.00005, self._slowest)
        return seconds + world.random.random() * LATE_SECONDS if world.chance(self.spikes) else seconds

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
        """The process takes and says nothing while it is paused; its kernel answers, so its connections stay."""
        process.pause()

    def _time_out(self, connection: Connection, end: End, still: Callable[[], bool]) -> None:
        def check() -> None:
            if still() and connection in self.connections:
                connection.lose()

        self.world.after(self.world.random.uniform(*GONE_SECONDS), check, end.process)

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

    def __init__(self, network: Network, client: End, server: End) -> None:
        self.network = network
        self.client = client
        self.server = server
        self.ends = (client, server)
        self.pair = frozenset((client.process.name, server.process.name))
        self.lost = False
        self._open = {id(client), id(server)}
        self._latest = {id(client): 0.0, id(server): 0.0}
        self._held: list[tuple[End, Frames | None]] = []
        self._dropped: set[int] = set()
        self._last_sent: tuple[float, int] = (-1.0, 0)
        self._number = 0

    def other(self, end: End) -> End:
        return self.server if end is self.client else self.client

    def send(self, sender: End, frames: Frames | None) -> None:
        """Send to the other end; None ends the connection."""
        world, receiver = self.network.world, self.other(sender)
        self._number += 1
        number = self._number
        if frames is not None:
            self._last_sent = (world.now, number)
        arrival = max(self._latest[id(receiver)], world.now + self.network.delay())
        self._latest[id(receiver)] = arrival
        world.at(arrival, lambda: None if number in self._dropped else self._arrive(receiver, frames))

    def _arrive(self, receiver: End, frames: Frames | None) -> None:
        if self.lost:
            return
        if self._held or self.network.is_cut(self.client.process, self.server.process):
            self._held.append((receiver, frames))
            return
        receiver.process.run(lambda: self._received(receiver, frames))

    def _received(self, receiver: End, frames: Frames | None) -> None:
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

    def finish(self, end: End) -> None:
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

    def _close(self, end: End) -> None:
        if id(end) in self._open:
            self._open.discard(id(end))
            self._forget()
            end.disconnected(self)

    def _forget(self) -> None:
        if self in self.network.connections:
            self.network.connections.remove(self)

"""Tells at once when the connection to an engine breaks, from the monitor of the socket that engines connect to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from tandem.wire.sockets import SocketOptions

EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
# Monitored from before the first connection, as a connection that nobody saw begin could be lost unseen.
CONTROL_SOCKET = SocketOptions(handover=True, monitor=EVENTS)


class ConnectionMonitor:
    """Knows by which connection each engine came last. Events name connections by file descriptor, which is used again.

    The end of a connection overtakes the messages that came by it, as those wait in another queue. An engine is lost
    only once they have been taken: the last tokens of one that leaves are among them.

    Args:
        socket: bound ROUTER, made with CONTROL_SOCKET.
        on_lost: called with the routing id of an engine whose connection has broken.
    """

    def __init__(self, socket: zmq.asyncio.Socket, on_lost: Callable[[bytes], None]) -> None:
        self._socket = socket
        # Read without asyncio's wrapper: `identify` must read what is there without waiting.
        # Kept beside its shadow: an event that libzmq sends once its reader is closed blocks for ever, and us with it.
        self._events = socket.get_monitor_socket(EVENTS)
        self._monitor: zmq.Socket[bytes] = zmq.Socket.shadow(self._events.underlying)
        self._on_lost = on_lost
        self._open: set[int] = set()
        self._engines: dict[int, bytes] = {}
        self._connections: dict[bytes, int] = {}
        self._ended: list[bytes] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handle events as they come."""
        loop, events = asyncio.get_running_loop(), int(self._monitor.get(zmq.FD))
        loop.add_reader(events, self._read)
        loop.call_soon(self._read)  # the descriptor tells of news alone, not of what is there already
        try:
            yield
        finally:
            loop.remove_reader(events)

    def caught_up(self) -> None:
        """To be called after each message: if no other one is there, engines whose connections have ended are lost."""
        if self._ended and not int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            ended, self._ended = self._ended, []
            for engine in ended:
                self._on_lost(engine)

    def identify(self, connection: int, engine: bytes) -> bool:
        """Note that an engine registered by this connection. Return False if that has ended meanwhile."""
        self._read()  # so that an event of an earlier connection with this number is not taken for one of this
        if engine in self._ended:  # the earlier connection of this one is not to end the new one
            self._ended.remove(engine)
            self._on_lost(engine)
        if connection not in self._open:
            return False
        earlier = self._connections.get(engine)
        if earlier is not None:
            self._engines.pop(earlier, None)
        self._engines[connection] = engine
        self._connections[engine] = connection
        return True

    def _read(self) -> None:
        while True:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                break
            connection = event["value"]
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._open.add(connection)
            elif event["event"] == zmq.EVENT_DISCONNECTED:
                self._open.discard(connection)
                engine = self._engines.pop(connection, None)
                if engine is not None:
                    del self._connections[engine]
                    self._ended.append(engine)
        self.caught_up()

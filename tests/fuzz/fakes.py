"""Sockets without a network, a clock that jumps, and a watch for errors that are our own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import zmq

from tandem.errors import WireError
from tandem.wire.receiving import DroppedMessages

Frames = list[bytes]


class Defect(AssertionError):
    """The code under test has broken a promise."""


class FakeSocket:
    """A ZeroMQ socket of asyncio, for a receiver in this process.

    Attributes:
        sent: what was sent by it, to be taken out by the test.
    """

    def __init__(self, kind: int = zmq.DEALER) -> None:
        self.type = kind
        self.closed = False
        self.sent: deque[Frames] = deque()
        self._received: asyncio.Queue[Frames] = asyncio.Queue()

    def put(self, *frames: bytes) -> None:
        self._received.put_nowait(list(frames))

    async def taken(self) -> None:
        """Return once what was put has been handled."""
        while not self._received.empty():  # noqa: ASYNC110
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def recv_multipart(self) -> Frames:
        return await self._received.get()

    def send_multipart(self, frames: Frames, flags: int = 0) -> asyncio.Future[None]:
        self.sent.append(frames)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def send(self, data: bytes, flags: int = 0) -> asyncio.Future[None]:
        return self.send_multipart([data])

    def get_monitor_socket(self, events: int = 0) -> FakeSocket:
        return FakeSocket()

    def disable_monitor(self) -> None:
        pass

    def close(self, linger: int | None = None) -> None:
        self.closed = True


@dataclass(frozen=True)
class FakeFrame:
    """A frame that knows its connection."""

    bytes: bytes
    connection: int

    def get(self, option: int) -> int:
        assert option == zmq.SRCFD
        return self.connection


class MonitoredSocket(FakeSocket):
    """A bound ROUTER: each sender has a connection, which its monitor tells of."""

    def __init__(self) -> None:
        super().__init__(zmq.ROUTER)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.instance()
        self._events, self._monitor = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
        self._events.bind(f"inproc://monitor-{id(self)}")
        self._monitor.connect(f"inproc://monitor-{id(self)}")
        self._connections: dict[bytes, int] = {}
        self._came_by: deque[int] = deque()

    def put(self, *frames: bytes) -> None:
        sender = frames[0]
        if sender not in self._connections:
            used = self._connections.values()
            self._connections[sender] = next(number for number in itertools.count(3) if number not in used)
            self._tell(zmq.Event.ACCEPTED, self._connections[sender])
        self._came_by.append(self._connections[sender])
        super().put(*frames)

    def break_connection(self, sender: bytes) -> None:
        """What it sends next comes by another one."""
        connection = self._connections.pop(sender, None)
        if connection is not None:
            self._tell(zmq.Event.DISCONNECTED, connection)

    def get(self, option: int) -> int:
        assert option == zmq.EVENTS
        return 0 if self._received.empty() else int(zmq.POLLIN)

    async def recv_multipart(self, copy: bool = False) -> Any:
        frames = await super().recv_multipart()
        connection = self._came_by.popleft()
        return [FakeFrame(frame, connection) for frame in frames]

    def get_monitor_socket(self, events: int = 0) -> Any:
        return SimpleNamespace(underlying=self._monitor.underlying)

    def close(self, linger: int | None = None) -> None:
        super().close(linger)
        self._events.close(linger=0)
        self._monitor.close(linger=0)

    def _tell(self, event: int, connection: int) -> None:
        self._events.send_multipart([struct.pack("=hi", event, connection), b"tcp://127.0.0.1:1"])


class FakeSockets:
    """Makes fake sockets in place of connections.

    Attributes:
        made: all of them, by the order in which they were asked for.
    """

    def __init__(self) -> None:
        self.made: list[FakeSocket] = []

    def connect(self, kind: int, host: str, port: int, options: Any = None) -> FakeSocket:
        self.made.append(FakeSocket(kind))
        return self.made[-1]


class Clock:
    """`time.monotonic` of this process, which jumps ahead when told to; asyncio goes by it too."""

    def __init__(self) -> None:
        self._monotonic = time.monotonic
        self._ahead = 0.0

    def __call__(self) -> float:
        return self._monotonic() + self._ahead

    async def advance(self, seconds: float) -> None:
        """Let whatever waits for this long go on."""
        self._ahead += seconds
        for _ in range(6):
            await asyncio.sleep(0)


class OwnErrors(logging.Handler):
    """Notes errors of our own: dropped messages that were not to blame, and tracebacks in the log.

    Attributes:
        found: the errors, as far as nobody has asked for them.
        log_bytes: length of all that was logged.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.found: list[BaseException | str] = []
        self.log_bytes = 0
        self.longest = 0

    def emit(self, record: logging.LogRecord) -> None:
        length = len(record.getMessage())
        self.log_bytes += length
        self.longest = max(self.longest, length)
        if record.exc_info and record.exc_info[1] is not None:
            self.found.append(record.exc_info[1])

    def check(self) -> None:
        """Raise Defect for the first one, if there is one."""
        if self.found:
            first = self.found[0]
            self.found.clear()
            raise Defect(f"an error of our own: {first!r}") from (first if isinstance(first, BaseException) else None)


async def _at_once(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


@contextmanager
def watched() -> Iterator[tuple[Clock, OwnErrors]]:
    """Put the clock and the watch in place."""
    clock, errors = Clock(), OwnErrors()
    add, monotonic, to_thread = DroppedMessages.add, time.monotonic, asyncio.to_thread
    log = logging.getLogger("tandem")
    level, propagate = log.level, log.propagate

    def add_and_watch(self: DroppedMessages, error: Exception) -> None:
        if not isinstance(error, WireError):
            errors.found.append(error)  # the log shows only some of them
        add(self, error)

    DroppedMessages.add = add_and_watch  # type: ignore[method-assign]
    time.monotonic = clock
    asyncio.to_thread = _at_once  # type: ignore[assignment]  # what a thread would do when is not for the seed to say
    log.addHandler(errors)
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        yield clock, errors
    finally:
        log.removeHandler(errors)
        log.setLevel(level)
        log.propagate = propagate
        time.monotonic, asyncio.to_thread = monotonic, to_thread
        DroppedMessages.add = add  # type: ignore[method-assign]

"""The socket to which engines register, and what comes and goes over it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from tandem.errors import EngineLost, RequestError, request_error
from tandem.router.registry import EngineEntry, EngineRegistry
from tandem.wire.codec import Codec
from tandem.wire.messages import (
    Abort,
    EngineStatus,
    Failed,
    Generate,
    Goodbye,
    Introduce,
    Outputs,
    PeerAddress,
    Register,
    Registered,
    ToEngine,
    ToFrontend,
    Tokens,
)
from tandem.wire.receiving import DroppedMessages, receive_messages

log = logging.getLogger(__name__)

TICK = 0.5


Inbox = asyncio.Queue[tuple["Channel", Tokens | RequestError]]


@dataclass(slots=True, eq=False)
class Channel:
    """Where the messages of one request from one engine arrive. Close it, and the engine hears of it."""

    request_id: str
    member: EngineEntry
    inbox: Inbox
    finished: bool = False


@dataclass(slots=True)
class Hub:
    """Registers engines, beats their hearts, and carries messages between requests and engines.

    Args:
        socket: bound ROUTER.
        introduce: whether prefill engines are made known to decode engines (a router does; an engine's own API
            knows just the one engine).
        on_change: called when an engine came, went or changed.
    """

    socket: zmq.asyncio.Socket
    pool: EngineRegistry
    introduce: bool
    on_change: Callable[[], None] = lambda: None
    _dropped: DroppedMessages = field(default_factory=lambda: DroppedMessages(log, "engine"))
    _refused: set[str] = field(default_factory=set)
    _codec: Codec[ToFrontend] = field(default_factory=lambda: Codec(ToFrontend))
    _channels: dict[tuple[bytes, str], Channel] = field(default_factory=dict)

    @property
    def bad_messages(self) -> int:
        """Messages of engines that were dropped so far."""
        return self._dropped.count

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(receive_messages(self.socket, self._codec, self._handle, self._dropped))
            group.create_task(self._watch())

    def open(self, generate: Generate, member: EngineEntry, inbox: Inbox) -> Channel:
        """Send a request to an engine; everything it says of it goes to `inbox`."""
        channel = Channel(generate.request_id, member, inbox)
        self._channels[member.route, generate.request_id] = channel
        member.active += 1
        self.send(member.route, generate)
        return channel

    def close(self, channel: Channel) -> None:
        """Nothing more is wanted; the engine is told unless it is done. Idempotent."""
        if self._channels.pop((channel.member.route, channel.request_id), None) is None:
            return
        if not channel.finished:
            self._finish(channel)
            self.send(channel.member.route, Abort(channel.request_id))

    @staticmethod
    def _finish(channel: Channel) -> None:
        """The engine has done its part, or is taken to be gone: it is no load any more."""
        if not channel.finished:
            channel.finished = True
            channel.member.active -= 1

    def send(self, route: bytes, message: ToEngine) -> None:
        self.socket.send_multipart([route, self._codec.encode(message)])

    def _handle(self, route: bytes, message: ToFrontend) -> None:
        now = time.monotonic()
        match message:
            case Outputs(items=items):
                for item in items:
                    self._deliver(route, item)
            case EngineStatus():
                member = self.pool.heard(route, message, now)
                self.send(route, Registered(True, member.register.connection) if member else Registered(False))
                self.on_change()
            case Register():
                self._register(route, message, now)
            case Goodbye(reason=reason):
                member = self.pool.leave(route)
                if member is not None:
                    self._fail_all(member, f"{member.engine_id} stops: {reason}")
                    self.on_change()

    def _register(self, route: bytes, message: Register, now: float) -> None:
        rival = self.pool.rival(message, now)
        if rival is not None:
            self._refuse(route, message, rival)
            return
        known = self.pool.get(route)
        if known is not None and known.register.connection != message.connection:
            self._fail_all(known, f"the connection to {known.engine_id} broke")
        for earlier in self.pool.register(route, message, now):
            self._fail_all(earlier, f"{earlier.engine_id} restarted")
        self.send(route, Registered(True, message.connection))
        if known is None:
            if self.introduce:  # an engine's own API is not what its operator waits for
                log.info("engine %s (%s) registered", message.identity, message.status.role)
            self._introduce_all()
        self.on_change()

    def _refuse(self, route: bytes, message: Register, rival: EngineEntry) -> None:
        """An engine that restarts is taken once its earlier life is silent; two that live cannot have one name."""
        if message.identity.incarnation not in self._refused:
            self._refused.add(message.identity.incarnation)
            log.warning(
                "two engines are called %s, at %s and %s: the second one is not used while the first one lives;"
                " give each its own --engine-id",
                rival.engine_id,
                rival.register.peer_address,
                message.peer_address,
            )
        self.send(route, Registered(False))

    def _introduce_all(self) -> None:
        if not self.introduce:
            return
        prefills = [PeerAddress(m.register.identity, m.register.peer_address) for m in self.pool.ready("prefill")]
        for member in self.pool.ready("decode"):
            self.send(member.route, Introduce(prefills))

    def _deliver(self, route: bytes, item: Tokens | Failed) -> None:
        channel = self._channels.get((route, item.request_id))
        if channel is None:
            return
        if isinstance(item, Failed):
            self._finish(channel)
            error = request_error(item.code, item.message, item.param, item.retry_after)
            channel.inbox.put_nowait((channel, error))
            return
        if item.done:
            self._finish(channel)
        channel.inbox.put_nowait((channel, item))

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(TICK)
            overslept = time.monotonic() - before - TICK
            if overslept > TICK:
                self.pool.pardon(overslept)
            lost = self.pool.expire(time.monotonic())
            for member in lost:
                log.warning("engine %s is not heard of any more", member.register.identity)
                self._fail_all(member, f"{member.engine_id} is not heard of any more")
            if lost:
                self.on_change()
            self._introduce_all()

    def _fail_all(self, member: EngineEntry, why: str) -> None:
        for channel in list(self._channels.values()):
            if channel.member is member and not channel.finished:
                self._finish(channel)
                self.send(member.route, Abort(channel.request_id))  # it may be there after all
                channel.inbox.put_nowait((channel, EngineLost(why)))

    def stop(self) -> None:
        self.socket.close(linger=0)

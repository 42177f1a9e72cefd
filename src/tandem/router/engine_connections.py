"""The socket to which engines register: heartbeats, broken connections, introductions, the messages of requests."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import zmq
import zmq.asyncio

from tandem.api.backend import EngineState
from tandem.errors import Draining, EngineFailed, EngineLeft, EngineLost, RequestError, WireError, request_error
from tandem.router.connection_monitor import ConnectionMonitor
from tandem.router.engine_registry import MAX_ENGINES, EngineEntry, EngineRegistry
from tandem.router.stream_check import StreamCheck
from tandem.wire.codec import Codec
from tandem.wire.engine_status import EngineStatus
from tandem.wire.messages import (
    Abort,
    Failed,
    Generate,
    Goodbye,
    Introduce,
    Output,
    Outputs,
    PeerAddress,
    PromptScores,
    Register,
    Registered,
    ToEngine,
    ToFrontend,
    Tokens,
)
from tandem.wire.receiving import DroppedMessages, receive_with_connections

log = logging.getLogger(__name__)

CHECK_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Stalled:
    """A step of the engine hangs, `reason`: go elsewhere if there is a route; said again while that lasts."""

    reason: str


StreamMessage = Tokens | PromptScores | RequestError | Stalled
StreamQueue = asyncio.Queue[tuple["EngineStream", StreamMessage]]


@dataclass(slots=True, eq=False)
class EngineStream:
    """One request on one engine: the engine's messages about it go to `queue`, which streams may share.

    `prompt_tokens`: that the engine has to compute for it.
    """

    request_id: str
    engine: EngineEntry
    queue: StreamQueue
    check: StreamCheck
    prompt_tokens: int = 0
    finished: bool = False

    def put(self, message: StreamMessage) -> None:
        self.queue.put_nowait((self, message))

    def finish(self) -> None:
        """The engine has done its part, or is taken to be gone: the request is no load on it any more."""
        if not self.finished:
            self.finished = True
            self.engine.active -= 1
            self.engine.prompt_tokens -= self.prompt_tokens


@dataclass(slots=True)
class EngineConnections:
    """Registers engines, watches their heartbeats, and carries messages between requests and engines.

    Args:
        socket: bound ROUTER, made with CONTROL_SOCKET.
        introduce: whether prefill engines are made known to decode engines (a router does; an engine's own API
            knows just the one engine).
        on_change: called when an engine came, went or changed.

    Attributes:
        dropped: messages of engines that could not be taken.
    """

    socket: zmq.asyncio.Socket
    registry: EngineRegistry
    introduce: bool
    on_change: Callable[[], None] = lambda: None
    dropped: DroppedMessages = field(default_factory=lambda: DroppedMessages(log, "engine"))
    _refused: dict[str, None] = field(default_factory=dict)
    _codec: Codec[ToFrontend] = field(default_factory=lambda: Codec(ToFrontend))
    _streams: dict[tuple[bytes, str], EngineStream] = field(default_factory=dict)
    _change: asyncio.Event = field(default_factory=asyncio.Event)
    _monitor: ConnectionMonitor = field(init=False)

    def __post_init__(self) -> None:
        self._monitor = ConnectionMonitor(self.socket, self._disconnected)

    async def run(self) -> None:
        """Serve the socket until cancelled."""
        with self._monitor.watching():
            async with asyncio.TaskGroup() as group:
                handled = self._monitor.caught_up
                receiving = receive_with_connections(self.socket, self._codec, self._handle, handled, self.dropped)
                group.create_task(receiving)
                group.create_task(self._watch())

    async def changed(self, seconds: float) -> None:
        """Return when an engine came, went or was heard, or after `seconds`."""
        change = self._change
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(change.wait(), seconds)

    def _note_change(self) -> None:
        change, self._change = self._change, asyncio.Event()
        change.set()
        self.on_change()

    def stop(self) -> None:
        self.socket.disable_monitor()
        self.socket.close(linger=0)

    def open(self, generate: Generate, engine: EngineEntry, queue: StreamQueue, prompt_tokens: int = 0) -> EngineStream:
        """Send a request to an engine. `prompt_tokens`: that it has to compute for it."""
        check = StreamCheck(generate, engine.engine_id, engine.register.vocab_size)
        stream = EngineStream(generate.request_id, engine, queue, check, prompt_tokens)
        self._streams[engine.sender, generate.request_id] = stream
        engine.active += 1
        engine.prompt_tokens += prompt_tokens
        self.send(engine.sender, generate)
        return stream

    def close(self, stream: EngineStream, *, keep: bool = False) -> None:
        """End a stream. Idempotent.

        Args:
            keep: an engine that has done its part is not told: what that has left there is used, or gone already.
        """
        known = self._streams.pop((stream.engine.sender, stream.request_id), None) is not None
        if known and not (keep and stream.finished):
            stream.finish()
            self.send(stream.engine.sender, Abort(stream.request_id))

    def send(self, receiver: bytes, message: ToEngine) -> None:
        self.socket.send_multipart([receiver, self._codec.encode(message)])

    def _handle(self, sender: bytes, connection: int, message: ToFrontend) -> None:
        now = time.monotonic()
        match message:
            case Outputs(items=items):
                for item in items:
                    self._deliver(sender, item)
            case EngineStatus():
                known = self.registry.get(sender)
                role = known.role if known is not None else None
                engine = self.registry.heartbeat(sender, message, now)
                self.send(sender, Registered(True, engine.register.connection) if engine else Registered(False))
                if engine is not None and engine.role != role and self.introduce:
                    self._introduce_all()  # before the first request that it has the new role for
                self._note_change()
            case Register():
                if self._monitor.identify(connection, sender):
                    self._register(sender, message, now)
            case Goodbye(reason=reason, failed=failed):
                self.send(sender, Registered(False))
                engine = self.registry.leave(sender)
                if engine is not None:
                    kind = EngineLost if failed else EngineLeft
                    self._gone(engine, kind(f"{engine.engine_id} stops: {reason}"))

    def _disconnected(self, sender: bytes) -> None:
        engine = self.registry.disconnect(sender)
        if engine is not None:
            log.warning("the connection to engine %s broke", engine.register.identity)
            self._gone(engine, EngineLost(f"the connection to {engine.engine_id} broke"))

    def _register(self, sender: bytes, message: Register, now: float) -> None:
        if sender != message.identity.incarnation.encode():
            raise WireError(f"{sender!r} registers as {message.identity}; an engine's socket bears its incarnation")
        if self.registry.is_full(message):
            raise WireError(f"there is no room for {message.identity}: {MAX_ENGINES} engines are registered")
        namesake = self.registry.living_namesake(message, now)
        if namesake is not None:
            self._refuse(sender, message, namesake)
            return
        known = self.registry.get(sender)
        if known is not None and known.register.connection != message.connection:
            self._fail_all(known, EngineLost(f"the connection to {known.engine_id} broke"))
        for earlier in self.registry.register(sender, message, now):
            self._fail_all(earlier, EngineLost(f"{earlier.engine_id} restarted"))
        self.send(sender, Registered(True, message.connection))
        if known is None and self.introduce:  # an engine's own API is not what its operator waits for
            log.info("engine %s (%s) registered", message.identity, message.status.role)
            self._introduce_all()
        self._note_change()

    def _refuse(self, sender: bytes, message: Register, namesake: EngineEntry) -> None:
        """Refuse a second engine of one name. One that restarts is taken once its earlier incarnation is silent."""
        incarnation = message.identity.incarnation
        told = incarnation in self._refused
        self._refused.pop(incarnation, None)
        self._refused[incarnation] = None  # those that were refused last
        if len(self._refused) > MAX_ENGINES:
            del self._refused[next(iter(self._refused))]
        if not told:
            log.warning(
                "two engines are called %s, at %s and %s: the second one is not used while the first one lives;"
                " give each its own --engine-id",
                namesake.engine_id,
                namesake.register.peer_address,
                message.peer_address,
            )
        self.send(sender, Registered(False))

    def _introduce_all(self) -> None:
        prefills = [PeerAddress(e.register.identity, e.register.peer_address) for e in self.registry.present("prefill")]
        for engine in self.registry.present("decode"):
            self.send(engine.sender, Introduce(prefills))

    def _deliver(self, sender: bytes, item: Output) -> None:
        stream = self._streams.get((sender, item.request_id))
        if stream is None:
            return
        if isinstance(item, Failed):
            stream.finish()
            error = request_error(item.code, item.message, item.param, item.retry_after)
            if isinstance(error, Draining):
                stream.engine.drains()  # it says so sooner than its next heartbeat
            stream.put(error)
            return
        try:
            if isinstance(item, PromptScores):
                stream.check.take_scores(item)
            else:
                stream.check.take(item)
        except EngineFailed as error:
            self.close(stream)  # nothing that it says is heard any more
            stream.put(error)
            return
        if isinstance(item, Tokens) and item.done:
            stream.finish()
        stream.put(item)

    async def _watch(self) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(CHECK_SECONDS)
            overslept = time.monotonic() - before - CHECK_SECONDS
            if overslept > CHECK_SECONDS:
                self.registry.discount(overslept)
            lost = self.registry.expire(time.monotonic())
            for engine in lost:
                log.warning("engine %s is not heard of any more", engine.register.identity)
                self._fail_all(engine, EngineLost(f"{engine.engine_id} is not heard of any more"))
            if lost:
                self._note_change()
            self._tell_stalled()
            if self.introduce:
                self._introduce_all()

    def _tell_stalled(self) -> None:
        for stream in self._streams.values():
            engine = stream.engine
            if engine.state is EngineState.STALLED and not stream.finished:
                stream.put(Stalled(f"{engine.engine_id} hangs: {engine.reason}"))

    def _gone(self, engine: EngineEntry, error: EngineFailed) -> None:
        """Fail its requests, and tell decode engines at once, so that none waits for its KV."""
        self._fail_all(engine, error)
        if self.introduce and engine.role == "prefill":
            self._introduce_all()
        self._note_change()

    def _fail_all(self, engine: EngineEntry, error: EngineFailed) -> None:
        for stream in self._streams.values():
            if stream.engine is engine and not stream.finished:
                stream.finish()
                self.send(engine.sender, Abort(stream.request_id))  # it may be there after all
                stream.put(type(error)(str(error)))  # one for each, as each is raised

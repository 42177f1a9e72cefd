"""The leader's connections to its frontends: the router, and the API of the engine itself."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from tandem.engine.timeouts import GOODBYE_SECONDS
from tandem.errors import InvalidRequest, RequestError
from tandem.wire.codec import Codec
from tandem.wire.control_messages import ChangeRole, DrainEngine, EngineControl
from tandem.wire.fields import clip
from tandem.wire.messages import (
    Abort,
    Address,
    Failed,
    Generate,
    Goodbye,
    Introduce,
    Output,
    Outputs,
    Register,
    Registered,
    ToEngine,
    ToFrontend,
    Tokens,
)
from tandem.wire.receiving import DroppedMessages, receive_messages
from tandem.wire.silence import Silence
from tandem.wire.sockets import SocketOptions, Sockets

log = logging.getLogger(__name__)

BEAT_SECONDS = 0.25
SILENCE_SECONDS = 10.0
"""A frontend answers every heartbeat, so this many seconds without any are no accident."""
WARN_SECONDS = 6.0
MAX_QUEUED = 4096


@dataclass(frozen=True, slots=True)
class FrontendEvents:
    """Called with what a frontend asks for, in the event loop's thread. `generate` may raise, and has begun nothing.

    `lost`: the frontend has gone, or its connection broke; it may come back.
    """

    generate: Callable[[Generate], None]
    abort: Callable[[str], None]
    introduce: Callable[[Introduce], None]
    control: Callable[[EngineControl], None]
    lost: Callable[[], None]


class Frontend:
    """The connection to one frontend: registers the engine, sends heartbeats, aborts requests when it falls silent.

    Args:
        register: returns the registration with the current status in it.
    """

    def __init__(
        self,
        address: Address,
        sockets: Sockets[zmq.asyncio.Socket],
        incarnation: str,
        register: Callable[[], Register],
        events: FrontendEvents,
    ) -> None:
        self._address = address
        self._active: set[str] = set()
        self._register = register
        self._events = events
        self._codec: Codec[ToEngine] = Codec(ToEngine)
        self._dropped = DroppedMessages(log, f"frontend {address}")
        self._known = False
        self._leaving = False
        self._left = asyncio.Event()
        self._breaks = 0
        self._warn_at = 0.0
        self._silence: Silence[Address] = Silence(SILENCE_SECONDS, BEAT_SECONDS)
        options = SocketOptions(identity=incarnation.encode(), hwm=MAX_QUEUED, monitor=zmq.EVENT_DISCONNECTED)
        self._socket = sockets.connect(zmq.DEALER, address.host, address.port, options)
        self._monitor = self._socket.get_monitor_socket()

    async def run(self) -> None:
        """Serve until cancelled."""
        self._warn_at = time.monotonic() + WARN_SECONDS
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(receive_messages(self._socket, self._codec, self._handle, self._dropped))
                group.create_task(self._beat())
                group.create_task(self._watch())
        finally:
            self._socket.disable_monitor()
            self._socket.close(linger=200)

    def send(self, items: list[Output]) -> None:
        """Send what a step has for this frontend."""
        for item in items:
            if isinstance(item, Failed) or (isinstance(item, Tokens) and item.done):
                self._active.discard(item.request_id)
        self._send(Outputs(items))

    async def leave(self, reason: str, *, failed: bool) -> None:
        """Say goodbye; returns once the frontend has all that was sent to it, cannot be reached, or takes too long."""
        self._leaving = True
        self._send(Goodbye(clip(reason), failed))
        if self._known:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._left.wait(), GOODBYE_SECONDS)

    def _send(self, message: ToFrontend) -> None:
        """Send now or never: what a frontend that is not there cannot take must not pile up here."""
        if not self._socket.closed:
            sending = self._socket.send(self._codec.encode(message), zmq.NOBLOCK)
            asyncio.ensure_future(sending).add_done_callback(_forget)

    async def _beat(self) -> None:
        while not self._leaving:
            registration = msgspec.structs.replace(self._register(), connection=self._breaks)
            self._send(registration.status if self._known else registration)
            self._warn_unknown(time.monotonic())
            await asyncio.sleep(BEAT_SECONDS)
            if self._silence.look(time.monotonic()) and self._active:
                self._abandon("is silent")

    def _warn_unknown(self, now: float) -> None:
        """Warn now and then while the frontend, for which this engine waits, does not answer."""
        if self._known:
            self._warn_at = now + WARN_SECONDS
        elif now > self._warn_at:
            self._warn_at = now + 10 * WARN_SECONDS
            log.warning(
                "the frontend at %s does not know this engine: is it started, is that its control port,"
                " and has it the same cluster key?",
                self._address,
            )

    async def _watch(self) -> None:
        """Start over when the connection breaks: what was on its way may be lost, and neither side could know."""
        while True:
            await self._monitor.recv_multipart()
            if self._leaving:
                self._left.set()
            self._abandon("cannot be reached")

    def _abandon(self, why: str) -> None:
        """Abort its requests. A frontend that is there, or comes back, learns of it from the next registration."""
        self._breaks += 1
        self._known = False
        self._events.lost()
        if self._active:
            log.warning("frontend %s %s: %d of its requests are aborted", self._address, why, len(self._active))
        for request_id in sorted(self._active):  # the same order in every run
            self._events.abort(request_id)
        self._active.clear()

    def _handle(self, _: bytes, message: ToEngine) -> None:
        self._silence.heard(self._address, time.monotonic())
        match message:
            case Registered(known=known, connection=connection):
                if self._leaving and not known:
                    self._left.set()
                elif not known and self._active:
                    self._abandon("has restarted")
                self._known = known and connection == self._breaks
            case Generate():
                self._begin(message)
            case Abort(request_id=request_id):
                self._active.discard(request_id)
                self._events.abort(request_id)
            case Introduce():
                self._events.introduce(message)
            case DrainEngine() | ChangeRole():
                self._events.control(message)
                if self._known:
                    self._send(self._register().status)  # it waits for this

    def _begin(self, message: Generate) -> None:
        self._active.add(message.request_id)
        try:
            self._events.generate(message)
        except InvalidRequest as error:
            self.send([Failed(message.request_id, error.code, str(error), error.param)])
        except Exception:  # of our own: the request has an outcome all the same, and the next one is served
            log.exception("request %s could not begin", message.request_id)
            text = "the engine failed to begin this request; its log says why"
            self.send([Failed(message.request_id, RequestError.code, text)])


def _forget(sent: asyncio.Future[Any]) -> None:
    """Ignore a full queue (EAGAIN): it belongs to a frontend that will be taken for lost."""
    if not sent.cancelled():
        sent.exception()

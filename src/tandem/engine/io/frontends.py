"""The leader's connections to its frontends: the router, and the API of the engine itself."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from tandem.errors import WireError
from tandem.wire.codec import Codec
from tandem.wire.messages import (
    Abort,
    Address,
    Failed,
    Generate,
    Goodbye,
    Introduce,
    Outputs,
    Register,
    Registered,
    ToEngine,
    ToFrontend,
    Tokens,
)
from tandem.wire.sockets import SocketOptions, Sockets

log = logging.getLogger(__name__)

BEAT = 0.25
SILENCE = 10.0
COMPLAIN_SECONDS = 6.0
MAX_QUEUED = 4096


@dataclass(frozen=True, slots=True)
class FrontendEvents:
    """What a frontend asks for; called in the event loop's thread."""

    generate: Callable[[Frontend, Generate], None]
    abort: Callable[[str], None]
    introduce: Callable[[Introduce], None]


class Frontend:
    """One frontend. Registers until it is known, beats, and is given up for its requests when it falls silent.

    Args:
        register: makes the registration with the current status in it.
    """

    def __init__(
        self,
        address: Address,
        sockets: Sockets[zmq.asyncio.Socket],
        incarnation: str,
        register: Callable[[], Register],
        events: FrontendEvents,
    ) -> None:
        self.address = address
        self.active: set[str] = set()
        self.bad_messages = 0
        self._register = register
        self._events = events
        self._codec: Codec[ToEngine] = Codec(ToEngine)
        self._known = False
        self._breaks = 0
        self._complain_at = time.monotonic() + COMPLAIN_SECONDS
        self._heard = time.monotonic()
        options = SocketOptions(identity=incarnation.encode(), hwm=MAX_QUEUED, monitor=zmq.EVENT_DISCONNECTED)
        self._socket = sockets.connect(zmq.DEALER, address.host, address.port, options)
        self._monitor = self._socket.get_monitor_socket()

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receive())
                group.create_task(self._beat())
                group.create_task(self._watch())
        finally:
            self._socket.disable_monitor()
            self._socket.close(linger=200)

    def send(self, items: list[Tokens | Failed]) -> None:
        """What a step has for this frontend."""
        for item in items:
            if isinstance(item, Failed) or item.done:
                self.active.discard(item.request_id)
        self._send(Outputs(items))

    def goodbye(self, reason: str) -> None:
        self._send(Goodbye(reason))

    def _send(self, message: ToFrontend) -> None:
        """Now or never: what a frontend that is not there cannot take must not pile up here."""
        if not self._socket.closed:
            sending = self._socket.send(self._codec.encode(message), zmq.NOBLOCK)
            asyncio.ensure_future(sending).add_done_callback(_forget)

    async def _beat(self) -> None:
        while True:
            registration = msgspec.structs.replace(self._register(), connection=self._breaks)
            self._send(registration.status if self._known else registration)
            self._complain(time.monotonic())
            await asyncio.sleep(BEAT)
            if self.active and time.monotonic() - self._heard > SILENCE:
                self._abandon("is silent")

    def _complain(self, now: float) -> None:
        """A frontend that does not answer is waited for; somebody should know."""
        if self._known:
            self._complain_at = now + COMPLAIN_SECONDS
        elif now > self._complain_at:
            self._complain_at = now + 10 * COMPLAIN_SECONDS
            log.warning(
                "the frontend at %s does not know this engine: is it started, is that its control port,"
                " and has it the same cluster key?",
                self.address,
            )

    async def _watch(self) -> None:
        """What was on its way when the connection broke may be lost, unnoticed: both sides begin anew."""
        while True:
            await self._monitor.recv_multipart()
            self._abandon("cannot be reached")

    def _abandon(self, why: str) -> None:
        """Give its requests up. A frontend that is there, or comes back, hears of it by the next registration."""
        self._breaks += 1
        self._known = False
        if self.active:
            log.warning("frontend %s %s: %d of its requests are aborted", self.address, why, len(self.active))
        for request_id in self.active:
            self._events.abort(request_id)
        self.active.clear()

    async def _receive(self) -> None:
        while True:
            data = await self._socket.recv()
            self._heard = time.monotonic()
            try:
                self._handle(self._codec.decode(data))
            except WireError as error:
                self.bad_messages += 1
                log.warning("message of frontend %s dropped: %s", self.address, error)
            except Exception:  # whatever one message does, the next one is served
                self.bad_messages += 1
                log.exception("a message of frontend %s could not be handled", self.address)

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Registered(known=known, connection=connection):
                if not known and self.active:
                    self._abandon("has restarted")
                self._known = known and connection == self._breaks
            case Generate():
                self.active.add(message.request_id)
                self._events.generate(self, message)
            case Abort(request_id=request_id):
                self.active.discard(request_id)
                self._events.abort(request_id)
            case Introduce():
                self._events.introduce(message)


def _forget(sent: asyncio.Future[Any]) -> None:
    """A queue that is full (EAGAIN) belongs to a frontend that will be taken for lost; nothing to be done here."""
    if not sent.cancelled():
        sent.exception()

"""Where decode engines shake hands with this engine, claim KV, renew and release it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from tandem.errors import PeerRefused
from tandem.ids import EngineIdentity
from tandem.transfer.handshake import EngineDescriptor, check_envelopes
from tandem.transfer.prefill.offers import Client, Outcome, Producer
from tandem.wire.codec import Codec
from tandem.wire.peer_messages import Claim, Envelope, Hello, Refused, Release, Renew, ToDecode, ToPrefill, Welcome
from tandem.wire.receiving import DroppedMessages, receive_messages

log = logging.getLogger(__name__)

MAX_PEER_MESSAGE = 8 * 1024 * 1024
TICK = 0.25


class PeerListener:
    """One ROUTER for all peers. A bad message is counted and dropped; the listener lives.

    Args:
        on_ended: requests whose blocks may return to the pool.
    """

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        identity: EngineIdentity,
        envelope: Envelope,
        descriptor: EngineDescriptor,
        lease_ttl: float,
        on_ended: Callable[[list[str]], None],
    ) -> None:
        self._socket = socket
        self._identity = identity
        self._envelope = envelope
        self._on_ended = on_ended
        self._codec: Codec[ToPrefill] = Codec(ToPrefill, MAX_PEER_MESSAGE)
        self._welcome = Welcome(envelope, identity, lease_ttl, msgspec.Raw(self._codec.encode(descriptor)))
        self._ttl = lease_ttl
        self._producer = Producer(identity.incarnation, lease_ttl)
        self._dropped = DroppedMessages(log, "peer")
        self.expired = 0

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(receive_messages(self._socket, self._codec, self._handle, self._dropped))
                group.create_task(self._expire())
        finally:
            self._socket.close(linger=0)

    @property
    def bad_messages(self) -> int:
        """Messages of peers that were dropped so far."""
        return self._dropped.count

    # --- what the engine says ------------------------------------------------------------------------------------

    def begin(self, request_id: str, wait: float | None = None, prompt: str | None = None) -> None:
        """The request has come here. `wait`: seconds for which its KV waits for a first claim; None for a lease."""
        self._apply(self._producer.begin(request_id, self._ttl if wait is None else wait, prompt))

    def knows(self, request_id: str) -> bool:
        """Whether a request of this id has come here whose blocks are not given back yet."""
        return self._producer.knows(request_id)

    def chunk(
        self, request_id: str, first_block: int, blocks: list[int], num_tokens: int, final: bool, token: int | None
    ) -> None:
        now = time.monotonic()
        self._apply(self._producer.chunk(request_id, first_block, blocks, num_tokens, final, token, now))

    def abort(self, request_id: str, reason: str) -> None:
        self._apply(self._producer.abort(request_id, reason, time.monotonic()))

    # --- what peers say ------------------------------------------------------------------------------------------

    def _handle(self, client: Client, message: ToPrefill) -> None:
        now = time.monotonic()
        if isinstance(message, Hello):
            self._send(client, self._answer(message))
            return
        if message.to != self._identity.incarnation:
            self._send(client, Refused(self._identity, "incarnation", self._identity.incarnation, message.to))
            return
        match message:
            case Claim():
                self._apply(self._producer.claim(client, message, now))
            case Renew():
                self._apply(self._producer.renew(client, message, now))
            case Release():
                self._apply(self._producer.release(client, message, now))

    def _answer(self, hello: Hello) -> Welcome | Refused:
        try:
            check_envelopes(self._envelope, hello.envelope)
            if hello.expected_engine_id != self._identity.engine_id:
                raise PeerRefused("engine_id", self._identity.engine_id, hello.expected_engine_id)
            if hello.expected_incarnation not in (None, self._identity.incarnation):
                raise PeerRefused("incarnation", self._identity.incarnation, str(hello.expected_incarnation))
        except PeerRefused as error:
            log.warning("decode engine %s refused: %s", hello.identity, error)
            return Refused(self._identity, error.field, error.ours, error.theirs)
        log.info("decode engine %s (%s) may read from here", hello.identity, hello.envelope.software)
        return self._welcome

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            outcome = self._producer.expire(time.monotonic())
            self.expired += len(outcome.expired)
            for request_id in outcome.expired:
                log.warning("request %s: lease ended; nobody read or released its KV", request_id)
            self._apply(outcome)

    def _apply(self, outcome: Outcome) -> None:
        for client, message in outcome.send:
            self._send(client, message)
        if outcome.ended:
            self._on_ended(outcome.ended)

    def _send(self, client: Client, message: ToDecode) -> None:
        self._socket.send_multipart([client, self._codec.encode(message)])

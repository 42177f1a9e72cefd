"""Answers decode engines that shake hands, claim KV, renew and release it: the shell around `Offers`."""

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
from tandem.transfer.handshake import EngineDescriptor, check_hello
from tandem.transfer.prefill.offers import Client, OfferCorrupt, OfferEnded, Offers, Send
from tandem.wire.codec import Codec
from tandem.wire.peer_messages import Claim, Envelope, Hello, Refused, Release, Renew, ToDecode, ToPrefill, Welcome
from tandem.wire.receiving import DroppedMessages, receive_messages

log = logging.getLogger(__name__)

MAX_PEER_MESSAGE = 1024 * 1024
MAX_PEER_MESSAGES = 1024
"""Bytes in a message of a decode engine, and messages of each that may wait here: what one may make us hold."""

TICK = 0.25


class PeerListener:
    """One ROUTER for all peers. A bad message is counted and dropped; the listener lives.

    Args:
        on_ended: called with the requests whose blocks may return to the pool.
        on_corrupt: called, before that, with requests whose blocks a reader found damaged.

    Attributes:
        expired: requests so far that a reader had claimed and then fell silent.
        gave_way: published requests so far whose KV nobody had claimed, and whose room others needed.
    """

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        identity: EngineIdentity,
        envelope: Envelope,
        descriptor: EngineDescriptor,
        lease_ttl: float,
        max_published: int,
        on_ended: Callable[[list[str]], None],
        on_corrupt: Callable[[list[str]], None],
    ) -> None:
        self._socket = socket
        self._identity = identity
        self._envelope = envelope
        self._on_ended = on_ended
        self._on_corrupt = on_corrupt
        self._codec: Codec[ToPrefill] = Codec(ToPrefill, MAX_PEER_MESSAGE)
        self._welcome = Welcome(envelope, identity, lease_ttl, msgspec.Raw(self._codec.encode(descriptor)))
        self._offers = Offers(identity.incarnation, lease_ttl, max_published)
        self._dropped = DroppedMessages(log, "peer")
        self.expired = 0
        self.gave_way = 0

    async def run(self) -> None:
        """Serve peers until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(receive_messages(self._socket, self._codec, self._handle, self._dropped))
                group.create_task(self._expire())
        finally:
            self._socket.close(linger=0)

    @property
    def bad_messages(self) -> int:
        """Number of peers' messages that were dropped so far."""
        return self._dropped.count

    # --- what the engine says ------------------------------------------------------------------------------------

    def begin(self, request_id: str, prompt: str | None = None, *, published: bool = False) -> None:
        """The request has come here. `published`: its KV waits longer for a first claim than others' does."""
        self._offers.begin(request_id, prompt, published=published)
        self._act()

    def short_of_blocks(self, short: bool) -> None:
        """A request waits for room in the pool, or none does any more."""
        self._offers.short_of_blocks = short

    def knows(self, request_id: str) -> bool:
        """Return whether a request of this id has come here whose blocks are not given back yet."""
        return self._offers.knows(request_id)

    def chunk(
        self, request_id: str, first_block: int, blocks: list[int], num_tokens: int, final: bool, token: int | None
    ) -> None:
        """A chunk of the prompt has been computed; `blocks` start at place `first_block` of the block table."""
        now = time.monotonic()
        self._offers.chunk(request_id, first_block, blocks, num_tokens, final, token, now)
        if final:
            self._offers.expire(now)  # nobody may wait for it any more
        self._act()

    def abort(self, request_id: str, reason: str) -> None:
        """The request ends here before its prompt was computed."""
        now = time.monotonic()
        self._offers.abort(request_id, reason, now)
        self._offers.expire(now)
        self._act()

    def withdraw(self, request_id: str) -> None:
        """Nobody waits for the request any more: its blocks stay only for those who may be reading them."""
        now = time.monotonic()
        self._offers.withdraw(request_id, now)
        self._offers.expire(now)
        self._act()

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
                self._offers.claim(client, message, now)
            case Renew():
                self._offers.renew(client, message, now)
            case Release():
                self._offers.release(client, message, now)
        self._act()

    def _answer(self, hello: Hello) -> Welcome | Refused:
        try:
            check_hello(self._envelope, self._identity, hello)
        except PeerRefused as error:
            log.warning("decode engine %s refused: %s", hello.identity, error)
            return Refused(self._identity, error.field, error.ours, error.theirs)
        log.info("decode engine %s (%s) may read from here", hello.identity, hello.envelope.software)
        return self._welcome

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            self._offers.expire(time.monotonic())
            self._act()

    def _act(self) -> None:
        ended = []
        for action in self._offers.drain():
            match action:
                case Send(client=client, message=message):
                    self._send(client, message)
                case OfferCorrupt(request_id=request_id):
                    log.error("request %s: a reader got KV that does not fit its checksums", request_id)
                    self._on_corrupt([request_id])
                case OfferEnded(request_id=request_id, expired=expired, gave_way=gave_way):
                    ended.append(request_id)
                    self.expired += expired
                    self.gave_way += gave_way
                    if expired:
                        log.warning("request %s: lease ended; nobody read or released its KV", request_id)
                    if gave_way:
                        log.info("request %s: nobody claimed its published KV, whose room others need", request_id)
        if ended:
            self._on_ended(ended)

    def _send(self, client: Client, message: ToDecode) -> None:
        self._socket.send_multipart([client, self._codec.encode(message)])

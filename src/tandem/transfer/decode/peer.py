"""One decode engine's session with one life of a prefill engine."""

from __future__ import annotations

import asyncio
import enum
import itertools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq
import zmq.asyncio

from tandem.errors import ConfigError, PeerLost, PeerRefused, TransferError, WireError
from tandem.ids import EngineIdentity
from tandem.kv.lease import ReaderLeases
from tandem.transfer.decode.pulls import Pull
from tandem.transfer.handshake import EngineDescriptor, check_envelopes, decode_descriptor
from tandem.wire.codec import Codec
from tandem.wire.messages import Address, PeerInfo, Refusal, clip
from tandem.wire.peer_messages import (
    Claim,
    Claimed,
    Envelope,
    Hello,
    KvComputed,
    KvGone,
    Refused,
    Release,
    Renew,
    Renewed,
    ToDecode,
    ToPrefill,
    Welcome,
)
from tandem.wire.sockets import SocketOptions, Sockets

log = logging.getLogger(__name__)

HELLO_TIMEOUT = 10.0
_NUMBERS = itertools.count(1)
KEEPALIVE = 1 << 40
"""Sequence number of a renewal that renews nothing: it only asks whether the peer is there."""


class PeerState(enum.Enum):
    CONNECTING = "connecting"
    READY = "ready"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class PeerEvents:
    """What a session tells its owner. All are called in the event loop's thread.

    `welcomed`: the peer's memory is known; answer by making every rank connect, and call `opened` for each.
    `received`: news of a request. `ended`: refused or lost, with the error; nothing comes after it.
    """

    welcomed: Callable[[PeerSession, EngineDescriptor], None]
    received: Callable[[Pull, KvComputed | KvGone, float], None]
    ended: Callable[[PeerSession, TransferError], None]


class PeerSession:
    """Socket, handshake, leases and renewals with one incarnation; all of it ends with `close`.

    Args:
        engine_id, incarnation: whom we mean to reach; a foreign proxy may not know the incarnation.
        lost_before: what the last session with it died of. Until this one is ready nobody should count on it.

    Attributes:
        introduced: a router vouches for it, and says when it is gone.
        pulls: what is being read from it, by the request's name there.
        opening: ranks that have not connected to its ranks yet.
    """

    def __init__(
        self,
        engine_id: str,
        incarnation: str | None,
        address: Address,
        identity: EngineIdentity,
        envelope: Envelope,
        sockets: Sockets[zmq.asyncio.Socket],
        events: PeerEvents,
        lost_before: TransferError | None = None,
    ) -> None:
        self._lost_before = lost_before
        self.engine_id = engine_id
        self.incarnation = incarnation
        self.address = address
        self.state = PeerState.CONNECTING
        self.error: TransferError | None = None
        self.descriptor: EngineDescriptor | None = None
        self.introduced = False
        self.handshake_time: float | None = None
        self._began = time.monotonic()
        self.pulls: dict[str, Pull] = {}
        self.opening: set[int] = set()
        self._leases = ReaderLeases(ttl=1.0)
        self._heard = 0.0
        self._identity = identity
        self._envelope = envelope
        self._events = events
        self._codec: Codec[ToDecode] = Codec(ToDecode)
        self._opened = asyncio.Event()
        self._number = next(_NUMBERS)
        # Of its own: leases are held under this name, and must not pass from a session that was lost to the next one.
        name = f"{identity.incarnation}/{self._number}"
        self._socket = sockets.connect(zmq.DEALER, address.host, address.port, SocketOptions(identity=name.encode()))
        self._task = asyncio.create_task(self._run(), name=f"peer {engine_id}")

    @property
    def key(self) -> str:
        """Names this session towards the ranks."""
        return f"{self.engine_id}/{self.incarnation}/{self._number}"

    @property
    def info(self) -> PeerInfo:
        state, error = self.state, self.error
        if state is PeerState.CONNECTING and self._lost_before is not None:
            state, error = PeerState.LOST, self._lost_before
        return PeerInfo(
            self.engine_id,
            self.incarnation or "",
            state.value,
            clip(str(error)) if error else None,
            self.handshake_time,
            _refusal(error),
        )

    def opened(self, rank: int, error: str | None) -> None:
        """One of our ranks has connected to the ranks it reads from, or could not."""
        self.opening.discard(rank)
        if error is not None:
            self._end(TransferError(error))
        elif not self.opening and self.state is PeerState.CONNECTING:
            self.state = PeerState.READY
            self.handshake_time = time.monotonic() - self._began
            log.info("peer %s ready after %.0f ms", self.key, self.handshake_time * 1000)
            for pull in self.pulls.values():
                self._claim(pull)
            self._opened.set()

    def add(self, pull: Pull) -> None:
        """Claim a request's KV, as soon as the session is ready."""
        self.pulls[pull.remote_id] = pull
        if self.state is PeerState.READY:
            self._claim(pull)

    def good(self, pull: Pull, completed_at: float) -> bool:
        """Whether bytes of a read for this request that completed then may be used."""
        return self._leases.good(pull.remote_id, completed_at)

    def remove(self, pull: Pull) -> None:
        """Nothing more is wanted of it, or everything is here: its blocks may go."""
        if self.pulls.get(pull.remote_id) is not pull:
            return
        del self.pulls[pull.remote_id]
        self._leases.drop(pull.remote_id)
        if self.state is PeerState.READY:
            self._send(Release(self._to, [pull.remote_id]))

    def lost(self, why: str) -> None:
        """One of our ranks has lost its connection to one of its ranks."""
        self._end(PeerLost(why))

    def close(self) -> None:
        """Idempotent. The owner tells the ranks."""
        self._task.cancel()
        self._socket.close(linger=0)
        if self.state in (PeerState.CONNECTING, PeerState.READY):
            self.state = PeerState.LOST

    @property
    def _to(self) -> str:
        return self.incarnation or ""

    def _claim(self, pull: Pull) -> None:
        self._leases.claim(pull.remote_id, time.monotonic())
        pull.heard_at = time.monotonic()
        self._send(Claim(self._to, pull.remote_id, pull.prompt, pull.early))

    def _send(self, message: ToPrefill) -> None:
        if not self._socket.closed:
            self._socket.send(self._codec.encode(message))

    async def _run(self) -> None:
        try:
            await self._shake_hands()
            renewing = asyncio.create_task(self._renew())
            try:
                await asyncio.gather(self._receive(), renewing)
            finally:
                renewing.cancel()
        except TransferError as error:
            self._end(error)
        except (ConfigError, WireError) as error:
            self._end(TransferError(f"{self.engine_id} at {self.address}: {error}"))

    def _end(self, error: TransferError) -> None:
        if self.state in (PeerState.REFUSED, PeerState.LOST):
            return
        self.state = PeerState.REFUSED if isinstance(error, PeerRefused) else PeerState.LOST
        self.error = error
        log.warning("peer %s at %s: %s: %s", self.engine_id, self.address, self.state.value, error)
        self._events.ended(self, error)

    async def _shake_hands(self) -> None:
        self._send(Hello(self._envelope, self._identity, self.engine_id, self.incarnation))
        try:
            async with asyncio.timeout(HELLO_TIMEOUT):
                answer = self._codec.decode(await self._socket.recv())
        except TimeoutError:
            raise PeerLost(f"no answer from {self.engine_id} at {self.address} in {HELLO_TIMEOUT:.0f} s") from None
        match answer:
            case Refused(field=field, mine=mine, yours=yours):
                raise PeerRefused(field, yours, mine)
            case Welcome():
                self._welcome(answer)
            case _:
                raise WireError(f"a welcome was expected, {type(answer).__name__} came")
        await self._opened.wait()
        self._heard = time.monotonic()

    def _welcome(self, welcome: Welcome) -> None:
        check_envelopes(self._envelope, welcome.envelope)
        if welcome.identity.engine_id != self.engine_id:
            raise PeerRefused("engine_id", self.engine_id, welcome.identity.engine_id)
        if self.incarnation is not None and welcome.identity.incarnation != self.incarnation:
            raise PeerRefused("incarnation", self.incarnation, welcome.identity.incarnation)
        self.incarnation = welcome.identity.incarnation
        self._leases = ReaderLeases(welcome.lease_ttl)
        self.descriptor = decode_descriptor(welcome.descriptor)
        if self.descriptor.identity != welcome.identity:
            raise WireError(f"{welcome.identity} describes another engine, {self.descriptor.identity}")
        self._events.welcomed(self, self.descriptor)

    async def _receive(self) -> None:
        while True:
            data = await self._socket.recv()
            now = time.monotonic()
            try:
                message = self._codec.decode(data)
            except WireError as error:
                log.error("peer %s: message dropped: %s", self.engine_id, error)
                continue
            match message:
                case Refused(field=field, mine=mine, yours=yours):
                    raise PeerLost(f"it restarted: {field} is {mine}, was {yours}")
                case Welcome():
                    continue
                case _ if message.source != self.incarnation:
                    continue
                case Renewed(seq=seq, gone=gone):
                    for request_id in self._leases.renewed(seq, gone):
                        self._lease_lost(request_id, "the lease ended", now)
                case Claimed(request_id=request_id):
                    self._leases.claimed(request_id)
                case KvComputed() | KvGone():
                    pull = self.pulls.get(message.request_id)
                    if pull is not None:
                        pull.heard_at = now
                        self._events.received(pull, message, now)
            self._heard = now

    def _lease_lost(self, remote_id: str, reason: str, now: float) -> None:
        pull = self.pulls.get(remote_id)
        if pull is not None:
            self._events.received(pull, KvGone(self.incarnation or "", remote_id, reason), now)

    async def _renew(self) -> None:
        """Batched for all requests of this pair, on a clock of its own; also tells when the peer is gone."""
        leases = self._leases
        while True:
            now = time.monotonic()
            if now - self._heard > leases.ttl:
                raise PeerLost(f"{self.engine_id} has not answered for {now - self._heard:.1f} s")
            for request_id in leases.run_out(now):
                self._lease_lost(request_id, "the lease was not renewed in time", now)
            for pull in list(self.pulls.values()):
                if not pull.final and now - pull.heard_at > leases.ttl:
                    # What was announced while the connection broke is lost; the answer to a claim restates it all.
                    self._claim(pull)
            renewal = leases.due(now)
            ids = renewal.request_ids if renewal else []
            self._send(Renew(self._to, renewal.seq if renewal else KEEPALIVE, ids))
            await asyncio.sleep(min(leases.interval, max(0.01, (leases.next_due() or now + leases.interval) - now)))


def _refusal(error: TransferError | None) -> Refusal | None:
    if not isinstance(error, PeerRefused):
        return None
    return Refusal(error.field, clip(error.ours), clip(error.theirs))

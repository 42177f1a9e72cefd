"""One decode engine's session with one incarnation of a prefill engine. Pure; time is passed in."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tandem.errors import PeerRefused, TransferError, WireError
from tandem.kv.lease import MAX_TTL, MIN_TTL, ReaderLeases
from tandem.transfer.decode.pull import Pull
from tandem.transfer.handshake import EngineDescriptor, check_envelopes, decode_descriptor
from tandem.wire.engine_status import PeerInfo, Refusal
from tandem.wire.fields import clip
from tandem.wire.messages import Address
from tandem.wire.peer_messages import Claim, Claimed, Envelope, Release, Renew, Welcome

HELLO_SECONDS = 10.0
"""A prefill engine may take this long to answer a Hello."""

CONNECT_SECONDS = 60.0
"""Our ranks may take this long after that to connect to its ranks."""

DOUBT_SECONDS = 1.0
"""A prefill engine that has left, as its routers say, may take this long to show that it is there all the same."""

KEEPALIVE = 1 << 40
"""Sequence number of a renewal that renews nothing: it only asks whether the peer is there."""


class SessionState(enum.Enum):
    CONNECTING = "connecting"
    READY = "ready"
    REFUSED = "refused"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Target:
    """The engine that a session means to reach; a foreign proxy may not know the incarnation.

    Sessions are kept by all three: a client that names a wrong address must not harm the session with the right one.
    """

    engine_id: str
    incarnation: str | None
    address: Address

    def __str__(self) -> str:
        return f"{self.engine_id} at {self.address}"


@dataclass(slots=True, eq=False)
class Session:
    """Handshake, leases and renewals with one incarnation, and the pulls that depend on them.

    Attributes:
        number: never used again, so leases that are held under it do not pass to the next session with the engine.
        introduced: a router vouches for the engine, and says when it is gone; else a client named it.
        began: when it was opened.
        used_at: when a request last asked for it.
        lost_before: how the last session with the engine ended. Until this one is ready nobody should count on it.
        error, ended_at: how and when it ended.
        incarnation: which incarnation has answered.
        connecting: our ranks that have not connected to the engine's ranks yet.
        pulls: what is being read from it, by the request's name there.
        heard_at: when the engine last sent something.
        doubted_at: when its routers said that it has left; nothing was heard of it since.
    """

    number: int
    target: Target
    introduced: bool
    began: float
    lost_before: TransferError | None = None
    state: SessionState = SessionState.CONNECTING
    used_at: float = 0.0
    error: TransferError | None = None
    ended_at: float | None = None
    incarnation: str = ""
    descriptor: EngineDescriptor | None = None
    connecting: set[int] = field(default_factory=set)
    handshake_time: float | None = None
    pulls: dict[str, Pull] = field(default_factory=dict)
    heard_at: float = 0.0
    doubted_at: float | None = None
    _leases: ReaderLeases = field(default_factory=lambda: ReaderLeases(ttl=1.0))
    _claims: int = 0
    _keepalive_at: float = 0.0

    @property
    def info(self) -> PeerInfo:
        state, error = self.state, self.error
        if state is SessionState.CONNECTING and self.lost_before is not None:
            state, error = SessionState.LOST, self.lost_before
        refusal = None
        if isinstance(error, PeerRefused):
            refusal = Refusal(error.field, clip(error.ours), clip(error.theirs))
        return PeerInfo(
            self.target.engine_id,
            self.incarnation or self.target.incarnation or "",
            state.value,
            clip(str(error)) if error else None,
            self.handshake_time,
            refusal,
        )

    # --- handshake -----------------------------------------------------------------------------------------------

    def welcome(self, ours: Envelope, message: Welcome, now: float, *, verify: bool = False) -> EngineDescriptor:
        """Take the engine's description. `verify`: what is read from it must come with checksums.

        Raises:
            PeerRefused: the two engines do not fit, or it is another engine or incarnation than was meant.
            WireError: the description makes no sense.
        """
        check_envelopes(ours, message.envelope)
        identity, target = message.identity, self.target
        if identity.engine_id != target.engine_id:
            raise PeerRefused("engine_id", target.engine_id, identity.engine_id)
        if target.incarnation not in (None, identity.incarnation):
            raise PeerRefused("incarnation", str(target.incarnation), identity.incarnation)
        descriptor = decode_descriptor(message.descriptor)
        if descriptor.identity != identity:
            raise WireError(f"{identity} describes another engine, {descriptor.identity}")
        if not MIN_TTL <= message.lease_ttl <= MAX_TTL:
            raise WireError(f"a lease lasts from {MIN_TTL:g} to {MAX_TTL:g} s; it says {message.lease_ttl:g}")
        if verify and not descriptor.has_checksums:
            raise PeerRefused("verify_kv", "on", "off")
        self.incarnation = identity.incarnation
        self.descriptor = descriptor
        self.heard_at = now
        self._leases = ReaderLeases(message.lease_ttl)
        return descriptor

    def ready(self, now: float) -> None:
        """All our ranks are connected."""
        self.state = SessionState.READY
        self.heard_at = now
        self.handshake_time = now - self.began

    def end(self, error: TransferError, now: float) -> list[Pull]:
        """Refused, or lost. Returns the pulls that end with it."""
        self.state = SessionState.REFUSED if isinstance(error, PeerRefused) else SessionState.LOST
        self.error = error
        self.ended_at = now
        pulls, self.pulls = list(self.pulls.values()), {}
        return pulls

    def overdue(self, now: float) -> str | None:
        """Return why it must be given up by now; None if it need not."""
        engine_id = self.target.engine_id
        if self.doubted_at is not None and now - self.doubted_at > DOUBT_SECONDS:
            return f"{engine_id} has left, and does not answer"
        if self.state is SessionState.READY:
            silence = now - self.heard_at
            return f"{engine_id} has not answered for {silence:.1f} s" if silence > self._leases.ttl else None
        if self.descriptor is None:
            late = now - self.began > HELLO_SECONDS
            return f"no answer from {self.target} in {HELLO_SECONDS:.0f} s" if late else None
        late = now - self.heard_at > CONNECT_SECONDS
        return f"the ranks did not connect to those of {engine_id} in {CONNECT_SECONDS:.0f} s" if late else None

    def heard(self, now: float) -> None:
        """The engine has sent something: it is there."""
        self.heard_at = now
        self.doubted_at = None

    def doubt(self, now: float) -> Renew | None:
        """Its routers say that it has left, but pulls depend on it. Return the question to send, if none is open."""
        if self.doubted_at is not None or self.ended_at is not None:
            return None
        self.doubted_at = now
        return Renew(self.incarnation, KEEPALIVE, []) if self.state is SessionState.READY else None

    def worth_retrying(self, now: float, retry_seconds: float) -> bool:
        """One incarnation that refuses will refuse again; what answers at the address later may not."""
        refused_for_good = self.state is SessionState.REFUSED and self.target.incarnation is not None
        return self.ended_at is not None and not refused_for_good and now - self.ended_at > retry_seconds

    # --- leases --------------------------------------------------------------------------------------------------

    def claim(self, pull: Pull, now: float) -> Claim:
        """Return the claim to send now. The same pull may claim again: its lease counts from the first time."""
        if not pull.claim:
            self._claims += 1
            pull.claim = self._claims
        self._leases.claim(pull.remote_id, now)
        pull.heard_at = now
        return Claim(self.incarnation, pull.remote_id, pull.prompt, pull.early, pull.claim)

    def claimed(self, message: Claimed) -> None:
        """A claim was granted; that of an earlier pull of the same KV grants nothing to this one."""
        pull = self.pulls.get(message.request_id)
        if pull is not None and pull.claim == message.number:
            pull.claimed = True
            self._leases.claimed(pull.remote_id)

    def remove(self, pull: Pull) -> Release | None:
        """Forget a pull. Returns what to send, so that its blocks may go."""
        if self.pulls.get(pull.remote_id) is not pull:
            return None
        del self.pulls[pull.remote_id]
        self._leases.drop(pull.remote_id)
        if self.state is not SessionState.READY:
            return None
        return Release(self.incarnation, [pull.remote_id], [pull.remote_id] if pull.corrupt else [])

    def good(self, pull: Pull, completed_at: float) -> bool:
        """Return whether bytes of a read for this pull that completed then may be used."""
        return (
            self.state is SessionState.READY
            and self.pulls.get(pull.remote_id) is pull
            and self._leases.good(pull.remote_id, completed_at)
        )

    def renewed(self, seq: int, gone: list[str]) -> list[Pull]:
        """A renewal was answered. Returns the pulls whose leases the engine has ended."""
        return self._pulls_of(self._leases.renewed(seq, gone))

    def run_out(self, now: float) -> list[Pull]:
        """Return the pulls whose leases were not granted or renewed in time."""
        return self._pulls_of(self._leases.run_out(now))

    def unheard(self, now: float) -> list[Pull]:
        """Return the pulls that should claim again.

        What was announced while the connection broke is lost; the answer to a claim restates it all.
        """
        ttl = self._leases.ttl
        return [pull for pull in self.pulls.values() if not pull.final and now - pull.heard_at > ttl]

    def renewal(self, now: float) -> Renew | None:
        """Return the renewal to send now, if it is time: for all requests at once, or just to hear of the peer."""
        due = self._leases.due(now)
        if due is None and now < self._keepalive_at:
            return None
        self._keepalive_at = now + self._leases.interval
        return Renew(self.incarnation, due.seq, due.request_ids) if due else Renew(self.incarnation, KEEPALIVE, [])

    def _pulls_of(self, remote_ids: list[str]) -> list[Pull]:
        return [self.pulls[remote_id] for remote_id in remote_ids if remote_id in self.pulls]

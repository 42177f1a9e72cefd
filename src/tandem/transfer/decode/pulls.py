"""The decode side of all hand-offs of an engine: sessions with prefill engines, claims, reads. Pure; time is passed in.

Events come in by methods, what is to be done about them is taken out with `drain`. KV is used only if every read of it
completed within its lease and its session; its blocks are quiet only when no byte can arrive in them any more.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from zlib import crc32

from tandem.errors import PeerLost, PeerRefused, TransferError, WireError
from tandem.ids import EngineIdentity
from tandem.kv.layout import KvLayout
from tandem.transfer.decode.actions import Action, Order, PullArrived, PullFailed, PullQuiet, Send
from tandem.transfer.decode.pull import Pull
from tandem.transfer.decode.session import Session, SessionState, Target
from tandem.transfer.decode.sessions import Sessions
from tandem.transfer.handshake import peers_needed
from tandem.transfer.thread.thread_messages import (
    FromTransferThread,
    OpenPeer,
    PeerOpened,
    ReadEnded,
    ReadOrder,
    ReadQuiet,
)
from tandem.wire.engine_status import PeerInfo
from tandem.wire.fields import clip
from tandem.wire.messages import Introduce, PullKv
from tandem.wire.peer_messages import (
    Claimed,
    Envelope,
    KvComputed,
    KvGone,
    Refused,
    Renewed,
    ToDecode,
    ToPrefill,
    Welcome,
)

log = logging.getLogger(__name__)


class Pulls:
    """Sessions by prefill engine, pulls by request.

    Args:
        layouts: of this engine's ranks, by rank.
        verify: read from engines with checksums only; our ranks check what comes.

    Attributes:
        failures: pulls that failed so far.
        corrupt: those of them whose bytes did not fit their checksums.
    """

    def __init__(
        self, identity: EngineIdentity, envelope: Envelope, layouts: Sequence[KvLayout], *, verify: bool = False
    ) -> None:
        self._identity = identity
        self._envelope = envelope
        self._layouts = layouts
        self._verify = verify
        self._pulls: dict[str, Pull] = {}
        self._jobs: dict[int, Pull] = {}
        self._job_numbers = itertools.count(1)
        self._actions: list[Action] = []
        self._sessions = Sessions(identity, envelope, self._actions)
        self.failures = 0
        self.corrupt = 0

    def __len__(self) -> int:
        """Requests whose KV is awaited, or still being read."""
        return len(self._pulls)

    def drain(self) -> list[Action]:
        """Return what is to be done since the last call, in order."""
        actions = self._actions.copy()
        self._actions.clear()
        return actions

    @property
    def peers(self) -> list[PeerInfo]:
        return self._sessions.peers

    # --- what the engine asks ------------------------------------------------------------------------------------

    def introduce(self, message: Introduce, now: float) -> None:
        """Shake hands early; forget sessions with engines that have left."""
        self._sessions.introduce(message, now)

    def knows(self, request_id: str) -> bool:
        """Return whether the request's KV is awaited, or still being read."""
        return request_id in self._pulls

    def open(self, request_id: str, source: PullKv, prompt: str | None, now: float, tokens: int | None = None) -> None:
        """Claim a request's KV; `allocated` says later where it goes. `prompt`: digest of its `tokens` tokens."""
        introduced = not source.foreign
        pull = Pull(request_id, source.remote_request_id, source.engine_id, source.first_token, prompt, introduced)
        self._pulls[request_id], pull.wanted = pull, tokens
        target = Target(source.engine_id, source.incarnation, source.address)
        while (unanswered := self._sessions.unanswered_in_the_way_of(target, introduced)) is not None:
            self._end_session(unanswered, PeerLost("it had not answered, and others need its place"), now)
        session = self._sessions.open(target, introduced, now)
        if isinstance(session, str):
            self._fail(pull, session)
        elif session.ended_at is not None:
            self._fail(pull, str(session.error))
        elif pull.remote_id in session.pulls:
            self._fail(pull, f"another request reads the KV of {pull.remote_id} already")
        else:
            pull.session = session.number
            session.pulls[pull.remote_id] = pull
            if session.state is SessionState.READY:
                self._send(session, session.claim(pull, now))

    def allocated(self, request_id: str, blocks: list[int], cached: int, wanted: int) -> None:
        """The KV goes into `blocks`. `wanted`: tokens of the prompt, of which the first `cached` are here already."""
        pull = self._pulls.get(request_id)
        if pull is not None and pull.ended is None:
            pull.allocated(blocks, cached, wanted)
            self._advance(pull)

    def give_up(self, request_id: str, reason: str) -> None:
        """The request does not want its KV any more. `PullQuiet` follows, at once or when its reads have ended."""
        pull = self._pulls.get(request_id)
        if pull is None:  # it arrived or failed meanwhile
            self._actions.append(PullQuiet(request_id))
        elif pull.ended is None:
            pull.ended = reason
            self._release(pull)
            self._settle(pull)

    # --- what connections bring ----------------------------------------------------------------------------------

    def received(self, number: int, message: ToDecode, now: float) -> None:
        """The prefill engine of a session has sent a message."""
        session = self._sessions.live(number)
        if session is None:
            return
        try:
            if session.descriptor is None:
                self._answered(session, message, now)
            else:
                self._told(session, message, now)
        except TransferError as error:
            self._end_session(session, error, now)
        except WireError as error:
            self.connection_failed(number, error, now)

    def unreadable(self, number: int, error: Exception, now: float) -> None:
        """A message could not be read or handled. Only a welcome is missed; and our own errors are not passed over."""
        session = self._sessions.live(number)
        if session is not None and (session.descriptor is None or not isinstance(error, WireError)):
            self.connection_failed(number, error, now)

    def connection_failed(self, number: int, error: Exception, now: float) -> None:
        """The session cannot go on: no connection can be made, or what came by it makes no sense."""
        session = self._sessions.live(number)
        if session is not None:
            self._end_session(session, TransferError(f"{session.target}: {error}"), now)

    def _answered(self, session: Session, message: ToDecode, now: float) -> None:
        """Raises TransferError or WireError if there can be no session."""
        match message:
            case Refused(field=field, mine=mine, yours=yours):
                raise PeerRefused(field, yours, mine)
            case Welcome():
                descriptor = session.welcome(self._envelope, message, now, verify=self._verify)
            case _:
                raise WireError(f"a welcome was expected, {type(message).__name__} came")
        # Each rank gets the peers that its plan needs; among replicas, not those that every engine takes.
        needed = peers_needed(descriptor.ranks, self._layouts, turn=crc32(self._identity.incarnation.encode()))
        session.connecting = set(range(len(needed)))
        for rank, sources in enumerate(needed):
            self._actions.append(Order(OpenPeer(session.number, sources), rank))

    def _told(self, session: Session, message: ToDecode, now: float) -> None:
        """Raises PeerLost if another incarnation answers."""
        match message:
            case Refused(field=field, mine=mine, yours=yours):
                raise PeerLost(f"it restarted: {field} is {mine}, was {yours}")
            case Welcome():
                return
            case _ if message.source != session.incarnation:
                return
            case Renewed(seq=seq, gone=gone):
                for pull in session.renewed(seq, gone):
                    self._fail(pull, "the lease ended")
            case Claimed():
                session.claimed(message)
            case KvComputed() | KvGone():
                self._announced(session, message, now)
        session.heard(now)

    def _announced(self, session: Session, message: KvComputed | KvGone, now: float) -> None:
        pull = session.pulls.get(message.request_id)
        if pull is None:
            return
        if isinstance(message, KvGone):
            self._fail(pull, message.reason)
        elif session.descriptor is not None and max(message.block_ids, default=0) >= session.descriptor.blocks:
            self._fail(pull, f"block {max(message.block_ids)} was announced; it has {session.descriptor.blocks}")
        elif pull.claimed:  # what came before was meant for an earlier pull: perhaps other blocks
            try:
                pull.announced(message, now)
            except WireError as error:
                self._fail(pull, str(error))
            else:
                self._advance(pull)

    # --- what transfer threads report ----------------------------------------------------------------------------

    def reported(self, report: FromTransferThread, now: float) -> None:
        match report:
            case PeerOpened():
                self._opened(report, now)
            case ReadEnded():
                self._read_ended(report, now)
            case ReadQuiet(rank=rank, job=job):
                pull = self._jobs.get(job)
                if pull is not None:
                    self._rank_is_quiet(pull, job, rank)
                    self._settle(pull)

    def _opened(self, report: PeerOpened, now: float) -> None:
        session = self._sessions.live(report.session)
        if session is None or session.state is not SessionState.CONNECTING or session.descriptor is None:
            return
        if report.error is not None:
            self._end_session(session, TransferError(report.error), now)
            return
        session.connecting.discard(report.rank)
        if session.connecting:
            return
        session.ready(now)
        log.info("session %d with %s: ready after %.3f s", session.number, session.target, now - session.began)
        for pull in session.pulls.values():
            self._send(session, session.claim(pull, now))

    def _read_ended(self, report: ReadEnded, now: float) -> None:
        pull = self._jobs.get(report.job)
        if pull is None or report.rank not in pull.jobs[report.job]:
            return
        pull.count(report.job, report.bytes, report.descriptors, report.seconds)
        if not report.may_still_write:
            self._rank_is_quiet(pull, report.job, report.rank)
        session = self._sessions.live(pull.session)
        if report.peer_lost and session is not None:  # and all its pulls with it; a new session connects again
            self._end_session(session, PeerLost(report.error or "a read failed"), now)
        if pull.ended is not None:
            self._settle(pull)
        elif report.error is not None:
            pull.corrupt, self.corrupt = report.corrupt, self.corrupt + report.corrupt
            self._fail(pull, report.error)
        elif session is None or not session.good(pull, now):
            self._fail(pull, "the lease ended before the read did")
        else:
            self._advance(pull)

    def _rank_is_quiet(self, pull: Pull, job: int, rank: int) -> None:
        ranks = pull.jobs[job]
        ranks.discard(rank)
        if not ranks:
            del pull.jobs[job], self._jobs[job]

    # --- time ----------------------------------------------------------------------------------------------------

    def tick(self, number: int, now: float) -> None:
        """Time has passed for a session: give up what is overdue, claim again, renew."""
        if (session := self._sessions.live(number)) is None:
            return
        if (overdue := session.overdue(now)) is not None:
            self._end_session(session, PeerLost(overdue), now)
            return
        if session.state is not SessionState.READY:
            return
        stuck = [one for one in self._jobs.values() if one.session == number and one.is_stuck(now)]  # looks at each
        if stuck:
            self._end_session(session, PeerLost("a read that nobody wants any more does not end"), now)
            return
        for pull in session.run_out(now):
            self._fail(pull, "the lease was not renewed in time")
        for pull in session.unheard(now):
            self._send(session, session.claim(pull, now))
        if (renewal := session.renewal(now)) is not None:
            self._send(session, renewal)

    def forget_ended(self, now: float) -> None:
        """Forget foreign sessions that ended a while ago."""
        self._sessions.forget_ended(now)

    # --- pulls and sessions --------------------------------------------------------------------------------------

    def _end_session(self, session: Session, error: TransferError, now: float) -> None:
        pulls = session.end(error, now)
        log.warning("session %d with %s: %s: %s", session.number, session.target, session.state.value, error)
        for pull in pulls:
            self._fail(pull, str(error))
        self._sessions.shut(session)

    def _send(self, session: Session, message: ToPrefill) -> None:
        self._actions.append(Send(session.number, message))

    def _advance(self, pull: Pull) -> None:
        """Read what can be read now; tell the engine when everything is here."""
        session = self._sessions.live(pull.session)
        if session is None or session.descriptor is None:
            return
        block_size = session.descriptor.block_size
        contradiction = pull.contradiction(block_size)
        if contradiction is not None:
            self._fail(pull, contradiction)
            return
        span = pull.next_read(block_size)
        if span is not None and pull.destination_blocks is not None:
            job = next(self._job_numbers)
            pull.jobs[job] = set(range(len(self._layouts)))
            self._jobs[job] = pull
            blocks = pull.source_blocks, pull.destination_blocks
            self._actions.append(Order(ReadOrder(job, session.number, pull.request_id, *blocks, *span, pull.final)))
        if pull.arrived:
            del self._pulls[pull.request_id]
            self._release(pull)
            self._actions.append(PullArrived(pull))

    def _fail(self, pull: Pull, reason: str) -> None:
        reason = clip(reason)
        self.failures += 1
        log.warning("request %s: its KV does not come from %s: %s", pull.request_id, pull.source_engine, reason)
        pull.ended = reason
        self._release(pull)
        first_token = pull.first_token if pull.first_token_expected else None
        self._actions.append(PullFailed(pull.request_id, reason, first_token))
        self._settle(pull)

    def _release(self, pull: Pull) -> None:
        """The prefill engine need not keep its blocks for us any more."""
        session = self._sessions.live(pull.session)
        release = session.remove(pull) if session is not None else None
        if session is not None and release is not None:
            self._send(session, release)

    def _settle(self, pull: Pull) -> None:
        """Tell the engine once no byte can arrive any more in the blocks of a pull that has ended."""
        if pull.ended is not None and not pull.reading and self._pulls.pop(pull.request_id, None) is not None:
            self._actions.append(PullQuiet(pull.request_id))

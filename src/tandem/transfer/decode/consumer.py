"""The decode side of all hand-offs of an engine: sessions with prefill engines, claims, reads."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import zmq
import zmq.asyncio

from tandem.errors import ConfigError, TransferError, WireError
from tandem.ids import EngineIdentity
from tandem.kv.layout import KvLayout
from tandem.transfer.decode.peer import PeerEvents, PeerSession, PeerState
from tandem.transfer.decode.pulls import Pull
from tandem.transfer.handshake import EngineDescriptor, peers_needed
from tandem.transfer.thread.leader_side import TransferThreads
from tandem.transfer.thread.orders import ClosePeer, FromTransferThread, OpenPeer, PeerOpened, ReadEnded, ReadOrder
from tandem.wire import messages
from tandem.wire.messages import Address, Introduce, PeerInfo, clip
from tandem.wire.peer_messages import Envelope, KvComputed, KvGone
from tandem.wire.sockets import Sockets

log = logging.getLogger(__name__)

MAX_SESSIONS = 4096
RETRY_SECONDS = 2.0

_Whom = tuple[str, str | None, Address]
"""Engine id, incarnation if known, and address: a client that names a wrong address shall not harm the right one."""


@dataclass(frozen=True, slots=True)
class ConsumerEvents:
    """What the consumer tells the engine. All are called in the event loop's thread.

    `arrived`: all KV is here. `failed`: it will not come, and why; after either, nothing is said of the request
    but `quiet`: no read into its blocks is in progress (any more).
    """

    arrived: Callable[[Pull], None]
    failed: Callable[[str, str], None]
    quiet: Callable[[str], None]


class Consumer:
    """Sessions by prefill engine, pulls by request.

    Args:
        layouts: of this engine's ranks, by rank.
    """

    def __init__(
        self,
        identity: EngineIdentity,
        envelope: Envelope,
        layouts: Sequence[KvLayout],
        transfer_threads: TransferThreads,
        sockets: Sockets[zmq.asyncio.Socket],
        events: ConsumerEvents,
    ) -> None:
        self._identity = identity
        self._envelope = envelope
        self._layouts = layouts
        self._transfer_threads = transfer_threads
        self._sockets = sockets
        self._events = events
        self._sessions: dict[_Whom, PeerSession] = {}
        self._ended_at: dict[_Whom, float] = {}
        self._pulls: dict[str, tuple[Pull, PeerSession]] = {}
        self._jobs: dict[int, tuple[Pull, PeerSession]] = {}
        self._numbers = itertools.count(1)
        self.failures = 0

    @property
    def peers(self) -> list[PeerInfo]:
        return [session.info for session in self._sessions.values()]

    def close(self) -> None:
        for session in self._sessions.values():
            session.close()

    # --- what the engine asks ------------------------------------------------------------------------------------

    def introduce(self, message: Introduce) -> None:
        """Shake hands early; forget sessions with engines that have left."""
        present = {p.identity.incarnation for p in message.peers}
        for peer in message.peers:
            self._session(peer.identity.engine_id, peer.identity.incarnation, peer.address, introduced=True)
        for key, session in list(self._sessions.items()):
            if session.introduced and session.incarnation not in present and not session.pulls:
                del self._sessions[key]
                self._ended_at.pop(key, None)
                self._shut(session)

    def knows(self, request_id: str) -> bool:
        """Whether the request's KV is awaited, or still being read."""
        return request_id in self._pulls or any(pull.request_id == request_id for pull, _ in self._jobs.values())

    def open(self, request_id: str, source: messages.PullKv, prompt: str | None = None) -> None:
        """Claim a request's KV; `allocated` says later where it goes. `prompt`: digest of its tokens."""
        session = self._session(source.engine_id, source.incarnation, source.address, introduced=not source.foreign)
        if isinstance(session, str):
            self._events.failed(request_id, session)
            self._events.quiet(request_id)
            return
        pull = Pull(request_id, source.remote_request_id, source.engine_id, source.first_token, prompt)
        pull.early = not source.foreign
        self._pulls[request_id] = (pull, session)
        if session.state in (PeerState.REFUSED, PeerState.LOST):
            self._fail(pull, session, str(session.error))
        elif pull.remote_id in session.pulls:
            self._fail(pull, session, f"another request reads the KV of {pull.remote_id} already")
        else:
            session.add(pull)

    def allocated(self, request_id: str, blocks: list[int], cached: int, wanted: int) -> None:
        """Where the KV goes. `wanted`: tokens of the prompt, of which the first `cached` are here already."""
        entry = self._pulls.get(request_id)
        if entry is not None:
            entry[0].allocated(blocks, cached, wanted)
            self._advance(*entry)

    def give_up(self, request_id: str, why: str) -> None:
        """The request does not want its KV any more. `quiet` follows, at once or when its reads have ended."""
        entry = self._pulls.pop(request_id, None)
        if entry is None:
            # It may have failed or arrived meanwhile; what has failed may still be being read.
            if not self.knows(request_id):
                self._events.quiet(request_id)
            return
        pull, session = entry
        pull.gave_up = why
        session.remove(pull)
        if not pull.reading:
            self._events.quiet(request_id)

    # --- sessions ------------------------------------------------------------------------------------------------

    def _session(
        self, engine_id: str, incarnation: str | None, address: Address, *, introduced: bool
    ) -> PeerSession | str:
        """The session with an engine, or why there can be none; a new one if the last one was lost a while ago."""
        key = (engine_id, incarnation, address)
        session = self._sessions.get(key)
        if session is not None and not self._try_again(key, session):
            session.introduced |= introduced
            return session
        if session is None and len(self._sessions) >= MAX_SESSIONS and not self._forget_ended():
            return f"more than {MAX_SESSIONS} prefill engines"
        self._ended_at.pop(key, None)
        lost_before = session.error if session is not None and session.state is PeerState.LOST else None
        events = PeerEvents(self._welcomed, self._received, self._ended)
        try:
            session = PeerSession(
                engine_id, incarnation, address, self._identity, self._envelope, self._sockets, events, lost_before
            )
        except (ConfigError, zmq.ZMQError) as error:
            log.warning("no session with %s at %s: %s", engine_id, address, error)
            return f"{engine_id} at {address}: {error}"
        session.introduced = introduced
        self._sessions[key] = session
        return session

    def _try_again(self, key: _Whom, session: PeerSession) -> bool:
        """One life of an engine that refuses will refuse again; what answers there later may not."""
        refused_for_good = session.state is PeerState.REFUSED and key[1] is not None
        ended_at = self._ended_at.get(key)
        return ended_at is not None and not refused_for_good and time.monotonic() - ended_at > RETRY_SECONDS

    def _forget_ended(self) -> bool:
        """Make room for a session; whether there was one that had ended."""
        for key in self._ended_at:
            del self._sessions[key], self._ended_at[key]
            return True
        return False

    def _welcomed(self, session: PeerSession, descriptor: EngineDescriptor) -> None:
        """Give each rank only the peers that its plan needs; among replicas, not those that every engine takes."""
        needed = peers_needed(descriptor.ranks, self._layouts, turn=crc32(self._identity.incarnation.encode()))
        session.opening = set(range(len(needed)))
        for rank, sources in enumerate(needed):
            self._transfer_threads.order(OpenPeer(session.key, sources), [rank])

    def _ended(self, session: PeerSession, error: TransferError) -> None:
        for key, known in self._sessions.items():
            if known is session:
                self._ended_at[key] = time.monotonic()
        for pull in list(session.pulls.values()):
            self._fail(pull, session, str(error))
        self._shut(session)

    def _shut(self, session: PeerSession) -> None:
        session.close()
        self._transfer_threads.order(ClosePeer(session.key))

    # --- pulls ---------------------------------------------------------------------------------------------------

    def _received(self, pull: Pull, message: KvComputed | KvGone, now: float) -> None:
        entry = self._pulls.get(pull.request_id)
        if entry is None:
            return
        if isinstance(message, KvGone):
            self._fail(pull, entry[1], message.reason)
            return
        try:
            pull.announced(message, now)
        except WireError as error:
            self._fail(pull, entry[1], str(error))
            return
        self._advance(pull, entry[1])

    def _advance(self, pull: Pull, session: PeerSession) -> None:
        """Read what can be read now; tell the engine when everything is here."""
        assert session.descriptor is not None or not pull.ready
        block_size = session.descriptor.block_size if session.descriptor else 1
        wrong = pull.contradiction(block_size)
        if wrong is not None:
            self._fail(pull, session, wrong)
            return
        span = pull.next_read(block_size)
        if span is not None and pull.destination_blocks is not None:
            job = next(self._numbers)
            pull.jobs[job] = set(range(self._transfer_threads.ranks))
            self._jobs[job] = (pull, session)
            self._transfer_threads.order(
                ReadOrder(
                    job, session.key, pull.request_id, pull.source_blocks, pull.destination_blocks, *span, pull.final
                )
            )
        if pull.arrived:
            del self._pulls[pull.request_id]
            session.remove(pull)
            self._events.arrived(pull)

    def reported(self, report: FromTransferThread) -> None:
        """A rank's transfer thread has something to say."""
        match report:
            case PeerOpened(rank=rank, peer=peer, error=error):
                for session in self._sessions.values():
                    if session.key == peer:
                        session.opened(rank, error)
            case ReadEnded():
                self._read_ended(report, time.monotonic())

    def _read_ended(self, report: ReadEnded, now: float) -> None:
        entry = self._jobs.get(report.job)
        if entry is None:
            return
        pull, session = entry
        pull.bytes += report.bytes
        pull.descriptors += report.descriptors
        pull.job_seconds[report.job] = max(pull.job_seconds.get(report.job, 0.0), report.seconds)
        ranks = pull.jobs[report.job]
        ranks.discard(report.rank)
        if not ranks:
            del pull.jobs[report.job], self._jobs[report.job]
        if pull.gave_up is not None:
            if not pull.reading:
                self._events.quiet(pull.request_id)
        elif report.error is not None and not report.peer_lost:
            self._fail(pull, session, report.error)
        elif not report.peer_lost and not session.good(pull, now):
            self._fail(pull, session, "the lease ended before the read did")
        elif not report.peer_lost:
            self._advance(pull, session)
        if report.peer_lost:
            session.lost(report.error or "a read failed")  # and with it all its pulls; a new session connects anew

    def _fail(self, pull: Pull, session: PeerSession, why: str) -> None:
        if self._pulls.pop(pull.request_id, None) is None:
            return
        self.failures += 1
        why = clip(why)
        log.warning("request %s: KV from %s is not to be had: %s", pull.request_id, session.engine_id, why)
        pull.gave_up = why
        session.remove(pull)
        self._events.failed(pull.request_id, why)
        if not pull.reading:
            self._events.quiet(pull.request_id)

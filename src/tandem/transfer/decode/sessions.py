"""All sessions of a decode engine, by the engine that each means to reach; bounded. Pure; time is passed in."""

from __future__ import annotations

import itertools

from tandem.ids import EngineIdentity
from tandem.transfer.decode.actions import Action, Connect, Disconnect, Order, Send
from tandem.transfer.decode.session import Session, SessionState, Target
from tandem.transfer.thread.thread_messages import ClosePeer
from tandem.wire.engine_status import MAX_PEERS, PeerInfo
from tandem.wire.messages import Introduce
from tandem.wire.peer_messages import Envelope, Hello

MAX_FOREIGN_SESSIONS = 64
"""With engines that clients named."""

MAX_INTRODUCED_SESSIONS = MAX_PEERS - MAX_FOREIGN_SESSIONS
"""With engines that a router named; all of them and the foreign ones fit into a heartbeat."""

RETRY_SECONDS = 2.0
"""A session that ended is tried again after this long, when somebody asks for it."""

FOREIGN_MEMORY_SECONDS = 60.0
"""A foreign session that ended is shown for this long."""


class Sessions:
    """Opens, finds and forgets sessions.

    Args:
        actions: takes what is to be done.
    """

    def __init__(self, identity: EngineIdentity, envelope: Envelope, actions: list[Action]) -> None:
        self._identity = identity
        self._envelope = envelope
        self._actions = actions
        self._by_number: dict[int, Session] = {}
        self._by_target: dict[Target, Session] = {}
        self._numbers = itertools.count(1)

    @property
    def peers(self) -> list[PeerInfo]:
        return [session.info for session in list(self._by_number.values())]

    def live(self, number: int) -> Session | None:
        """Return the session of this number, if it has not ended."""
        session = self._by_number.get(number)
        return session if session is not None and session.ended_at is None else None

    def introduce(self, message: Introduce, now: float) -> None:
        """Open sessions with these engines; forget those with engines that have left.

        An engine that the routers have lost may be there for us: where pulls depend on it, it is asked.
        """
        present = {peer.identity.incarnation for peer in message.peers}
        for peer in message.peers:
            session = self.open(Target(peer.identity.engine_id, peer.identity.incarnation, peer.address), True, now)
            if isinstance(session, Session):
                session.doubted_at = None
        for session in list(self._by_number.values()):
            incarnation = session.incarnation or session.target.incarnation
            if not session.introduced or incarnation in present:
                continue
            if not session.pulls:
                self._forget(session)
            elif (question := session.doubt(now)) is not None:
                self._actions.append(Send(session.number, question))

    def unanswered_in_the_way_of(self, target: Target, introduced: bool) -> Session | None:
        """Return a session that should end so that `open` finds room, though requests wait for it.

        Clients can name engines that are not there. The foreign session that has waited longest for an answer ends
        before one gives way that was answered, be it idle; so those do not keep real engines out.
        """
        known = self._by_target.get(target)
        foreign = [session for session in self._by_number.values() if not session.introduced]
        if introduced or (known is not None and known.ended_at is None) or len(foreign) < MAX_FOREIGN_SESSIONS:
            return None
        if any(session.ended_at is not None and not session.pulls for session in foreign):
            return None
        unanswered = [session for session in foreign if session.descriptor is None and session.ended_at is None]
        return min(unanswered, key=lambda session: session.began, default=None)

    def open(self, target: Target, introduced: bool, now: float) -> Session | str:
        """Return the session with an engine, a new one if the last was lost a while ago; or why there can be none."""
        session = self._by_target.get(target)
        lost_before = None
        if session is not None:
            if not session.worth_retrying(now, RETRY_SECONDS):
                session.introduced |= introduced
                session.used_at = now
                return session
            lost_before = session.error if session.state is SessionState.LOST else None
            introduced |= session.introduced
            self._forget(session)
        problem = self._make_room(introduced)
        if problem is not None:
            return problem
        session = Session(next(self._numbers), target, introduced, now, lost_before, used_at=now)
        self._by_number[session.number] = self._by_target[target] = session
        hello = Hello(self._envelope, self._identity, target.engine_id, target.incarnation)
        self._actions += [Connect(session.number, target.address), Send(session.number, hello)]
        return session

    def shut(self, session: Session) -> None:
        """Close its connections, here and on every rank."""
        self._actions += [Disconnect(session.number), Order(ClosePeer(session.number))]

    def forget_ended(self, now: float) -> None:
        """Forget foreign sessions that ended a while ago; nobody else says that they are gone."""
        for session in list(self._by_number.values()):
            ended_at = session.ended_at
            if not session.introduced and ended_at is not None and now - ended_at > FOREIGN_MEMORY_SECONDS:
                self._forget(session)

    def _make_room(self, introduced: bool) -> str | None:
        """Forget a session if there are too many of this kind. Return why that is not possible.

        Clients can name any number of engines: a foreign session that nobody uses gives way even while it is open.
        """
        limit = MAX_INTRODUCED_SESSIONS if introduced else MAX_FOREIGN_SESSIONS
        alike = [session for session in self._by_number.values() if session.introduced == introduced]
        if len(alike) < limit:
            return None
        unused = [s for s in alike if not s.pulls and (s.ended_at is not None or not introduced)]
        if not unused:
            kind = "prefill engines" if introduced else "prefill engines that clients named are in use"
            return f"more than {limit} {kind}"
        self._forget(min(unused, key=lambda s: (s.ended_at is None, s.used_at)))
        return None

    def _forget(self, session: Session) -> None:
        del self._by_number[session.number], self._by_target[session.target]
        if session.ended_at is None:
            self.shut(session)

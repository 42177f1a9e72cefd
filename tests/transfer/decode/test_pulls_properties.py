"""Whatever comes in whichever order: no wrong bytes are used, no block is free too early, every pull ends once."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tandem.errors import WireError
from tandem.ids import EngineIdentity
from tandem.transfer.decode import sessions as module
from tandem.transfer.decode.actions import Action, Connect, Disconnect, Order, PullArrived, PullFailed, PullQuiet, Send
from tandem.transfer.decode.pulls import Pulls
from tandem.transfer.thread.thread_messages import ClosePeer, OpenPeer, PeerOpened, ReadEnded, ReadOrder, ReadQuiet
from tandem.wire.messages import Address, Introduce, PeerAddress, PullKv
from tandem.wire.peer_messages import (
    Claim,
    Claimed,
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
from tests.transfer.engines import ENVELOPE, descriptor

TTL = 10.0
RANKS = (0, 1)
TOKENS = 10
INCARNATION = "first"

INTRODUCED = PullKv("p0", INCARNATION, Address("127.0.0.1", 1), "")
FOREIGN = [
    PullKv("p1", None, Address("127.0.0.1", 2), "", foreign=True),
    PullKv("p0", INCARNATION, Address("127.0.0.1", 3), "", foreign=True),
]
SOURCES = {source.address: source for source in [INTRODUCED, *FOREIGN]}


@dataclass
class Session:
    """What the test knows of a session: it is in the model from Connect to Disconnect."""

    source: PullKv
    welcomed: bool = False
    opening: set[int] = field(default_factory=set)
    claims: dict[int, tuple[str, float]] = field(default_factory=dict)  # number -> remote id, when it was first sent
    renewals: dict[int, tuple[float, list[str]]] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        return self.welcomed and not self.opening


@dataclass
class Pull:
    """What the test knows of a pull: it is in the model until it has arrived or is quiet.

    `may_write`: (job, rank) that may still write into its blocks. `bad`: one of them ended in another way than it
    should. `good_until`: end of its lease.
    """

    source: PullKv
    claim: tuple[int, int] | None = None
    good_until: float | None = None
    allocated: bool = False
    read_until: int = 0
    running: set[tuple[int, int]] = field(default_factory=set)
    may_write: set[tuple[int, int]] = field(default_factory=set)
    bad: bool = False
    ended: bool = False


class AnyOrder(RuleBasedStateMachine):
    ids = st.sampled_from(["r0", "r1", "r2"])
    remote_ids = st.sampled_from(["x", "y"])
    arrivals = 0

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(module, "MAX_FOREIGN_SESSIONS", 1)
        self.now = 100.0
        who = EngineIdentity("d0", "d0-incarnation")
        self.core = Pulls(who, ENVELOPE, [rank.layout for rank in descriptor(who, tp=len(RANKS)).ranks])
        self.numbers: set[int] = set()
        self.sessions: dict[int, Session] = {}
        self.pulls: dict[str, Pull] = {}
        self.quiet_expected: list[str] = []

    # --- what it does ----------------------------------------------------------------------------------------------

    def act(self) -> None:
        for action in self.core.drain():
            self.do(action)
        assert self.quiet_expected == []

    def do(self, action: Action) -> None:
        match action:
            case Connect(session=number, address=address):
                assert number not in self.numbers, "a session number is used twice"
                self.numbers.add(number)
                self.sessions[number] = Session(SOURCES[address])
            case Disconnect(session=number):
                del self.sessions[number]
            case Send(session=number, message=message):
                self.sent(number, message)
            case Order(message=OpenPeer(session=number), rank=int(rank)):
                self.sessions[number].opening.add(rank)
            case Order(message=ReadOrder() as order, rank=None):
                self.ordered(order)
            case Order(message=ClosePeer(session=number), rank=None):
                assert number not in self.sessions
            case PullArrived(pull=pull):
                self.arrived(pull.request_id)
            case PullFailed(request_id=request_id):
                assert not self.pulls[request_id].ended, "a pull ends twice"
                self.pulls[request_id].ended = True
            case PullQuiet(request_id=request_id):
                self.is_quiet(request_id)
            case _:
                raise AssertionError(action)

    def sent(self, number: int, message: ToPrefill) -> None:
        session = self.sessions[number]
        match message:
            case Hello():
                assert not session.welcomed
            case Claim(request_id=remote_id, number=claim):
                assert session.ready
                [pull] = [p for p in self.pulls.values() if not p.ended and self.means(p, session, remote_id)]
                assert pull.claim in (None, (number, claim)), "a pull claims under two numbers"
                pull.claim = (number, claim)
                session.claims.setdefault(claim, (remote_id, self.now))
            case Renew(seq=seq, request_ids=remote_ids):
                session.renewals[seq] = (self.now, remote_ids)
            case Release():
                pass

    @staticmethod
    def means(pull: Pull, session: Session, remote_id: str) -> bool:
        return pull.source.address == session.source.address and pull.source.remote_request_id == remote_id

    def ordered(self, order: ReadOrder) -> None:
        pull = self.pulls[order.request_id]
        assert not pull.ended, "it reads for a pull that has ended"
        assert pull.allocated, "it reads into blocks that nobody gave"
        assert pull.claim is not None
        assert pull.claim[0] == order.session
        assert order.session in self.sessions, "it reads outside of a session"
        assert order.start == pull.read_until, "tokens are read twice or never"
        pull.read_until = order.stop
        pull.running |= {(order.job, rank) for rank in RANKS}
        pull.may_write |= pull.running

    def arrived(self, request_id: str) -> None:
        pull = self.pulls.pop(request_id)
        assert not pull.ended, "a pull ends twice"
        assert not pull.bad, "bytes are used that came outside of the lease or the session, or not at all"
        assert not pull.may_write, "it is used while it is being read"
        assert pull.read_until == TOKENS
        type(self).arrivals += 1

    def is_quiet(self, request_id: str) -> None:
        if request_id in self.quiet_expected:
            self.quiet_expected.remove(request_id)
            return
        pull = self.pulls.pop(request_id)  # KeyError: twice quiet
        assert pull.ended
        assert not pull.may_write, "blocks are free while bytes may still arrive in them"

    # --- requests --------------------------------------------------------------------------------------------------

    @rule(peers=st.sampled_from([[], [INTRODUCED], [INTRODUCED]]))
    def introduce(self, peers: list[PullKv]) -> None:
        known = [PeerAddress(EngineIdentity(p.engine_id, str(p.incarnation)), p.address) for p in peers]
        self.core.introduce(Introduce(known), self.now)
        self.act()

    @rule(request_id=ids, source=st.sampled_from([INTRODUCED, INTRODUCED, *FOREIGN]), remote_id=remote_ids)
    def opens(self, request_id: str, source: PullKv, remote_id: str) -> None:
        if request_id not in self.pulls:
            named = msgspec.structs.replace(source, remote_request_id=remote_id)
            self.pulls[request_id] = Pull(named)
            self.core.open(request_id, named, None, self.now)
            self.act()

    @rule(request_id=ids, cached=st.sampled_from([0, 0, 4, TOKENS]))
    def allocated(self, request_id: str, cached: int) -> None:
        pull = self.pulls.get(request_id)
        if pull is None or not pull.allocated:
            if pull is not None:
                pull.allocated, pull.read_until = True, cached
            self.core.allocated(request_id, [0, 1, 2], cached, TOKENS)
            self.act()

    @rule(request_id=ids)
    def gives_up(self, request_id: str) -> None:
        if request_id in self.pulls:
            self.pulls[request_id].ended = True
        else:
            self.quiet_expected.append(request_id)
        self.core.give_up(request_id, "why")
        self.act()

    # --- peers -----------------------------------------------------------------------------------------------------

    def received(self, number: int, message: ToDecode) -> None:
        self.core.received(number, message, self.now)
        self.act()

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), willing=st.sampled_from([True, True, True, False]))
    def greets(self, data: st.DataObject, willing: bool) -> None:
        number = data.draw(st.sampled_from(sorted(self.sessions)))
        if willing:
            self.welcomes(number)
        else:
            identity = EngineIdentity(self.sessions[number].source.engine_id, INCARNATION)
            self.received(number, Refused(identity, "connector", "nixl", "tcp"))
            assert number not in self.sessions

    def welcomes(self, number: int) -> None:
        session = self.sessions[number]
        session.welcomed = True
        identity = EngineIdentity(session.source.engine_id, INCARNATION)
        described = msgspec.Raw(msgspec.msgpack.encode(descriptor(identity)))
        self.received(number, Welcome(ENVELOPE, identity, TTL, described))

    @precondition(lambda self: any(session.opening for session in self.sessions.values()))
    @rule(data=st.data(), error=st.sampled_from([None, None, None, "no route"]))
    def rank_opens(self, data: st.DataObject, error: str | None) -> None:
        opening = [(number, rank) for number, session in self.sessions.items() for rank in session.opening]
        number, rank = data.draw(st.sampled_from(sorted(opening)))
        self.sessions[number].opening.discard(rank)
        self.core.reported(PeerOpened(rank, number, error), self.now)
        self.act()

    @precondition(lambda self: self.sessions)
    @rule(data=st.data())
    def becomes_ready(self, data: st.DataObject) -> None:
        self.readies(data.draw(st.sampled_from(sorted(self.sessions))))

    def readies(self, number: int) -> None:
        session = self.sessions[number]
        if not session.welcomed:
            self.welcomes(number)
        for rank in sorted(session.opening):
            session.opening.discard(rank)
            self.core.reported(PeerOpened(rank, number), self.now)
            self.act()

    @precondition(lambda self: any(session.claims for session in self.sessions.values()))
    @rule(data=st.data())
    def grants(self, data: st.DataObject) -> None:
        """Any claim that was sent in this session, also one of a pull that has ended."""
        claims = [(number, claim) for number, session in self.sessions.items() for claim in session.claims]
        self.grant(*data.draw(st.sampled_from(sorted(claims))))

    def grant(self, number: int, claim: int) -> None:
        remote_id, sent_at = self.sessions[number].claims[claim]
        for pull in self.pulls.values():
            if pull.claim == (number, claim) and not pull.ended and pull.good_until is None:
                pull.good_until = sent_at + TTL
        self.received(number, Claimed(INCARNATION, remote_id, claim))

    @precondition(lambda self: self.sessions)
    @rule(
        data=st.data(),
        remote_id=remote_ids,
        chunk=st.sampled_from([(3, False), (8, False), (TOKENS, True), (TOKENS, True), (8, True), (12, False)]),
    )
    def announces(self, data: st.DataObject, remote_id: str, chunk: tuple[int, bool]) -> None:
        number = data.draw(st.sampled_from(sorted(self.sessions)))
        self.announce(number, remote_id, *chunk)

    @rule(
        request_id=ids,
        source=st.sampled_from([INTRODUCED, *FOREIGN]),
        remote_id=remote_ids,
        granted=st.sampled_from([True, True, False]),
    )
    def goes_well_until_it_is_read(self, request_id: str, source: PullKv, remote_id: str, granted: bool) -> None:
        """If not `granted`, what comes is the answer to the claim of an earlier pull."""
        if request_id in self.pulls:
            return
        self.opens(request_id, source, remote_id)
        for number, session in list(self.sessions.items()):
            if session.source.address == source.address:
                self.readies(number)
        self.allocated(request_id, 0)
        pull = self.pulls.get(request_id)
        if pull is None or pull.claim is None or pull.ended:
            return
        number, own = pull.claim
        for claim, (name, _) in self.sessions[number].claims.items():
            if name == remote_id and (claim == own) == granted:
                self.grant(number, claim)
        self.announce(number, remote_id, TOKENS, True)

    def announce(self, number: int, remote_id: str, tokens: int, final: bool) -> None:
        if self.sessions[number].welcomed:
            self.received(number, KvComputed(INCARNATION, remote_id, 0, [4, 5, 6], tokens, final, 7 if final else None))

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), remote_id=remote_ids)
    def has_none(self, data: st.DataObject, remote_id: str) -> None:
        number = data.draw(st.sampled_from(sorted(self.sessions)))
        if self.sessions[number].welcomed:
            self.received(number, KvGone(INCARNATION, remote_id, "aborted"))

    @precondition(lambda self: any(session.renewals for session in self.sessions.values()))
    @rule(data=st.data(), gone=st.sampled_from([[], [], ["x"], ["y"]]))
    def renews(self, data: st.DataObject, gone: list[str]) -> None:
        sent = [(number, seq) for number, session in self.sessions.items() for seq in session.renewals]
        number, seq = data.draw(st.sampled_from(sorted(sent)))
        sent_at, remote_ids = self.sessions[number].renewals.pop(seq)
        for pull in self.pulls.values():
            named = pull.source.remote_request_id in remote_ids and pull.source.remote_request_id not in gone
            if pull.claim is not None and pull.claim[0] == number and named and pull.good_until is not None:
                pull.good_until = max(pull.good_until, sent_at + TTL)
        lost = [
            p for p in self.pulls.values() if p.claim and p.claim[0] == number and p.source.remote_request_id in gone
        ]
        self.received(number, Renewed(INCARNATION, seq, gone))
        assert all(pull.ended for pull in lost), "a pull waits for KV that is gone"

    @precondition(lambda self: self.sessions)
    @rule(data=st.data(), error=st.sampled_from([WireError("nonsense")] * 6 + [None, RuntimeError("a bug")]))
    def connection_breaks(self, data: st.DataObject, error: Exception | None) -> None:
        number = data.draw(st.sampled_from(sorted(self.sessions)))
        if error is None:
            self.core.connection_failed(number, WireError("no socket"), self.now)
        else:
            self.core.unreadable(number, error, self.now)
        self.act()

    # --- transfer threads ------------------------------------------------------------------------------------------

    @precondition(lambda self: any(pull.running for pull in self.pulls.values()))
    @rule(data=st.data(), outcome=st.sampled_from(["done", "done", "done", "failed", "lost", "may write"]))
    def read_ends(self, data: st.DataObject, outcome: str) -> None:
        running = [(request_id, *read) for request_id, pull in self.pulls.items() for read in pull.running]
        self.ends(*data.draw(st.sampled_from(sorted(running))), outcome)

    @precondition(lambda self: any(pull.running for pull in self.pulls.values()))
    @rule(data=st.data(), slept=st.sampled_from([0.0, 0.0, TTL]))
    def reads_are_done(self, data: st.DataObject, slept: float) -> None:
        self.now += slept
        request_id = data.draw(st.sampled_from(sorted(r for r, pull in self.pulls.items() if pull.running)))
        for job, rank in sorted(self.pulls[request_id].running):
            self.ends(request_id, job, rank, "done")

    def ends(self, request_id: str, job: int, rank: int, outcome: str) -> None:
        pull = self.pulls[request_id]
        pull.running.discard((job, rank))
        if outcome != "may write":
            pull.may_write.discard((job, rank))
        in_session = pull.claim is not None and pull.claim[0] in self.sessions
        in_lease = pull.good_until is not None and self.now < pull.good_until
        pull.bad |= outcome != "done" or not in_session or not in_lease
        error = None if outcome == "done" else "broken"
        lost, may_write = outcome in ("lost", "may write"), outcome == "may write"
        self.core.reported(ReadEnded(rank, job, 1, 1, 0.1, error, lost, may_write), self.now)
        self.act()

    @precondition(lambda self: any(pull.may_write - pull.running for pull in self.pulls.values()))
    @rule(data=st.data())
    def read_is_quiet(self, data: st.DataObject) -> None:
        ended = [(request_id, *r) for request_id, pull in self.pulls.items() for r in pull.may_write - pull.running]
        request_id, job, rank = data.draw(st.sampled_from(sorted(ended)))
        self.pulls[request_id].may_write.discard((job, rank))
        self.core.reported(ReadQuiet(rank, job), self.now)
        self.act()

    # --- time ------------------------------------------------------------------------------------------------------

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.4, 3.4, TTL, 65.0]), asleep=st.booleans())
    def time_passes(self, seconds: float, asleep: bool) -> None:
        self.now += seconds
        if not asleep:
            for number in sorted(self.sessions):
                self.core.tick(number, self.now)
            self.core.forget_ended(self.now)
            self.act()

    # --- what must hold ----------------------------------------------------------------------------------------------

    @invariant()
    def it_knows_what_has_not_ended_and_nothing_else(self) -> None:
        assert len(self.core) == len(self.pulls)
        assert all(self.core.knows(request_id) for request_id in self.pulls)

    @invariant()
    def what_has_ended_is_quiet_as_soon_as_no_byte_can_arrive(self) -> None:
        assert not [pull for pull in self.pulls.values() if pull.ended and not pull.may_write]

    @invariant()
    def no_pull_outlives_its_session(self) -> None:
        assert not [p for p in self.pulls.values() if p.claim and p.claim[0] not in self.sessions and not p.ended]

    @invariant()
    def sessions_are_bounded(self) -> None:
        assert sum(session.source.foreign for session in self.sessions.values()) <= 1
        assert len(self.core.peers) <= 2

    def teardown(self) -> None:
        for request_id in list(self.pulls):
            self.gives_up(request_id)
        for number in list(self.sessions):
            self.core.connection_failed(number, WireError("the end"), self.now)
        self.act()
        for request_id, pull in list(self.pulls.items()):
            for job, rank in pull.may_write - pull.running:
                pull.may_write.discard((job, rank))
                self.core.reported(ReadQuiet(rank, job), self.now)
            for job, rank in sorted(pull.running):
                self.ends(request_id, job, rank, "failed")
        self.act()
        self.now += 100 * TTL
        self.core.forget_ended(self.now)
        self.core.introduce(Introduce([]), self.now)
        self.act()
        assert (self.pulls, self.sessions, self.core.peers) == ({}, {}, [])
        state = vars(self.core) | vars(vars(self.core)["_sessions"])
        left = {name for name, value in state.items() if isinstance(value, dict | list) and value}
        assert left <= {"_layouts"}, "state is left when everything has ended"
        self.patch.undo()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)


def test_pulls_do_arrive_in_some_of_these_orders() -> None:
    """The test above says nothing if everything fails early."""
    AnyOrder.arrivals = 0
    few = settings(max_examples=60, stateful_step_count=50, deadline=None, derandomize=True)
    run_state_machine_as_test(AnyOrder, settings=few)
    assert AnyOrder.arrivals >= 5

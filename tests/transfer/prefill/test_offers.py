"""Blocks go back once, when nobody may be reading them any more; readers are told what there is."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem.transfer.prefill import offers as module
from tandem.transfer.prefill.offers import Outcome, Producer
from tandem.wire.peer_messages import Claim, Claimed, KvComputed, KvGone, Release, Renew, Renewed

LIFE = "life"
TTL = 10.0
A, B = b"\x01", b"\x02"


@pytest.fixture
def producer() -> Producer:
    return Producer(LIFE, TTL)


def claim(producer: Producer, client: bytes, now: float, request_id: str = "r") -> Outcome:
    return producer.claim(client, Claim(LIFE, request_id), now)


def release(producer: Producer, client: bytes, now: float, request_id: str = "r") -> Outcome:
    return producer.release(client, Release(LIFE, [request_id]), now)


def kinds(outcome: Outcome) -> list[tuple[bytes, type]]:
    return [(client, type(message)) for client, message in outcome.send]


def test_a_claim_before_the_request_is_answered_and_hears_of_every_chunk(producer: Producer) -> None:
    assert claim(producer, A, 0.0).send == [(A, Claimed(LIFE, "r"))]
    producer.begin("r", TTL)
    first = producer.chunk("r", 0, [4, 5], 8, False, None, 1.0)
    assert first.send == [(A, KvComputed(LIFE, "r", 0, [4, 5], 8, False))]
    last = producer.chunk("r", 2, [6], 10, True, 77, 2.0)
    assert last.send == [(A, KvComputed(LIFE, "r", 2, [6], 10, True, 77))]
    assert release(producer, A, 3.0).ended == ["r"]


def test_a_late_claim_is_told_all_at_once_and_a_grown_block_once(producer: Producer) -> None:
    producer.begin("r", TTL)
    producer.chunk("r", 0, [4, 5], 7, False, None, 0.0)
    producer.chunk("r", 1, [5, 6], 10, True, 77, 0.0)
    assert claim(producer, A, 1.0).send == [
        (A, Claimed(LIFE, "r")),
        (A, KvComputed(LIFE, "r", 0, [4, 5, 6], 10, True, 77)),
    ]


def test_blocks_wait_for_the_last_of_several_readers(producer: Producer) -> None:
    producer.begin("r", TTL)
    claim(producer, A, 0.0)
    claim(producer, B, 0.0)
    producer.chunk("r", 0, [1], 4, True, 7, 0.0)
    assert release(producer, A, 1.0).ended == []
    assert release(producer, A, 1.0).ended == []
    assert release(producer, B, 1.0).ended == ["r"]
    assert len(producer) == 0


def test_a_release_by_somebody_who_never_claimed_changes_nothing(producer: Producer) -> None:
    producer.begin("r", TTL)
    claim(producer, A, 0.0)
    producer.chunk("r", 0, [1], 4, True, 7, 0.0)
    assert release(producer, B, 1.0) == Outcome()
    assert release(producer, B, 1.0, "unknown") == Outcome()


def test_a_reader_that_lets_go_early_leaves_blocks_that_wait_for_nobody(producer: Producer) -> None:
    producer.begin("r", 60.0)
    claim(producer, A, 0.0)
    assert release(producer, A, 1.0) == Outcome()
    assert producer.chunk("r", 0, [1], 4, True, 7, 2.0).send == []
    assert producer.expire(2.0).ended == ["r"]


def test_nobody_claims_and_the_blocks_go_back_after_the_wait_that_was_asked_for(producer: Producer) -> None:
    producer.begin("r", 60.0)
    producer.chunk("r", 0, [1], 4, True, 7, 5.0)
    assert producer.expire(64.9) == Outcome()
    outcome = producer.expire(65.0)
    assert outcome.ended == ["r"]
    assert outcome.expired == []  # nobody was late


def test_a_silent_reader_is_told_and_counted_when_its_lease_ends(producer: Producer) -> None:
    producer.begin("r", TTL)
    claim(producer, A, 0.0)
    producer.chunk("r", 0, [1], 4, True, 7, 0.0)
    outcome = producer.expire(TTL)
    assert (outcome.ended, outcome.expired, kinds(outcome)) == (["r"], ["r"], [(A, KvGone)])


def test_a_prompt_that_is_still_being_computed_does_not_expire(producer: Producer) -> None:
    producer.begin("r", TTL)
    claim(producer, A, 0.0)
    assert producer.expire(100 * TTL).ended == []
    producer.chunk("r", 0, [1], 4, True, 7, 100 * TTL)
    assert producer.expire(100 * TTL).ended == []
    assert producer.expire(101 * TTL).ended == ["r"]


def test_a_renewal_keeps_what_is_held_and_names_what_is_gone(producer: Producer) -> None:
    producer.begin("r", TTL)
    claim(producer, A, 0.0)
    producer.chunk("r", 0, [1], 4, True, 7, 0.0)
    renewal = Renew(LIFE, 3, ["r", "unknown"])
    assert producer.renew(A, renewal, 9.0).send == [(A, Renewed(LIFE, 3, ["unknown"]))]
    assert producer.renew(B, renewal, 9.0).send == [(B, Renewed(LIFE, 3, ["r", "unknown"]))]
    assert producer.expire(18.9).ended == []
    assert producer.expire(19.0).ended == ["r"]


def test_an_abort_without_claims_gives_the_blocks_back_at_once(producer: Producer) -> None:
    producer.begin("r", 60.0)
    producer.chunk("r", 0, [1], 4, False, None, 0.0)
    assert producer.abort("r", "why", 1.0) == Outcome()
    assert producer.expire(1.0).ended == ["r"]


def test_an_abort_tells_the_readers_and_waits_for_them(producer: Producer) -> None:
    producer.begin("r", TTL)
    claim(producer, A, 0.0)
    producer.chunk("r", 0, [1], 4, False, None, 0.0)
    assert producer.abort("r", "why", 1.0).send == [(A, KvGone(LIFE, "r", "why"))]
    assert producer.expire(2.0).ended == []
    assert producer.abort("r", "again", 2.0) == Outcome()
    assert release(producer, A, 3.0).ended == ["r"]
    assert producer.expire(100.0) == Outcome()


def test_an_abort_after_the_last_chunk_changes_nothing(producer: Producer) -> None:
    producer.begin("r", TTL)
    claim(producer, A, 0.0)
    producer.chunk("r", 0, [1], 4, True, 7, 0.0)
    assert producer.abort("r", "why", 1.0) == Outcome()
    assert producer.abort("unknown", "why", 1.0) == Outcome()


@pytest.mark.parametrize("computed", [False, True], ids=["before any chunk", "after a chunk"])
def test_a_claim_after_an_abort_is_told_that_there_is_no_kv(producer: Producer, computed: bool) -> None:
    producer.begin("r", TTL)
    claim(producer, A, 0.0)
    if computed:
        producer.chunk("r", 0, [1], 4, False, None, 0.0)
    producer.abort("r", "why", 1.0)
    assert claim(producer, B, 2.0).send == [(B, KvGone(LIFE, "r", "why"))]
    assert release(producer, A, 3.0).ended == ["r"]


def test_a_claim_whose_request_never_comes_is_told_so(producer: Producer) -> None:
    claim(producer, A, 0.0)
    assert producer.expire(TTL - 0.1) == Outcome()
    outcome = producer.expire(TTL)
    assert (kinds(outcome), outcome.ended) == ([(A, KvGone)], [])
    assert len(producer) == 0
    assert producer.expire(2 * TTL) == Outcome()


def test_a_request_that_came_in_time_does_not_end_with_the_patience_for_its_claim(producer: Producer) -> None:
    claim(producer, A, 0.0)
    producer.begin("r", TTL)
    assert producer.expire(5 * TTL) == Outcome()
    assert kinds(producer.chunk("r", 0, [1], 4, True, 7, 5 * TTL)) == [(A, KvComputed)]


def test_claims_of_requests_that_never_come_are_bounded(producer: Producer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EARLY_CLAIMS", 3)
    outcomes = [claim(producer, A, 0.0, str(number)) for number in range(5)]
    assert [kinds(outcome)[0][1] for outcome in outcomes] == [Claimed] * 3 + [KvGone] * 2
    assert len(producer) == 3
    producer.begin("0", TTL)
    assert kinds(claim(producer, A, 0.0, "6")) == [(A, Claimed)]
    producer.expire(TTL)
    assert kinds(claim(producer, A, TTL, "7")) == [(A, Claimed)]


@pytest.mark.parametrize("claimed_first", [True, False])
def test_kv_of_another_prompt_is_not_given_to_a_reader(producer: Producer, claimed_first: bool) -> None:
    outcomes = [claim(producer, A, 0.0)] if claimed_first else []
    outcomes.append(producer.begin("r", TTL, "digest"))
    if not claimed_first:
        outcomes.append(claim(producer, A, 0.0))
    assert kinds(outcomes[-1]) == [(A, KvGone)]
    right = producer.claim(B, Claim(LIFE, "r", "digest"), 0.0)
    assert kinds(right) == [(B, Claimed)]
    assert kinds(producer.chunk("r", 0, [1], 4, True, 7, 0.0)) == [(B, KvComputed)]
    release(producer, A, 0.0)
    assert release(producer, B, 0.0).ended == ["r"]


def test_a_claim_that_is_not_early_is_told_at_once_that_there_is_nothing(producer: Producer) -> None:
    assert kinds(producer.claim(A, Claim(LIFE, "r", early=False), 0.0)) == [(A, KvGone)]
    assert len(producer) == 0


class Interleavings(RuleBasedStateMachine):
    """Any order of events. A model keeps for each request who may be reading it, and until when."""

    ids = st.sampled_from(["r0", "r1", "r2"])
    clients = st.sampled_from([A, B])

    def __init__(self) -> None:
        super().__init__()
        self.producer = Producer(LIFE, TTL)
        self.now = 0.0
        self.computing: dict[str, int] = {}  # chunks so far
        self.over: set[str] = set()  # nothing more is computed
        self.ended: set[str] = set()
        self.reading: dict[tuple[str, bytes], float] = {}

    def took(self, outcome: Outcome) -> None:
        assert len(set(outcome.ended)) == len(outcome.ended)
        assert set(outcome.expired) <= set(outcome.ended)
        for request_id in outcome.ended:
            assert request_id in self.over, "blocks go back while they are being filled"
            assert request_id not in self.ended, "blocks go back twice"
            self.ended.add(request_id)
            late = [until for (name, _), until in self.reading.items() if name == request_id and until > self.now]
            assert not late, "blocks go back although somebody may be reading them"
        for client, message in outcome.send:
            if isinstance(message, Claimed):
                self.reading[message.request_id, client] = self.now + TTL
            elif isinstance(message, KvComputed):
                assert message.request_id not in self.ended
                assert message.final == (message.request_id in self.over)

    @rule(request_id=ids)
    def begin(self, request_id: str) -> None:
        if request_id not in self.computing:
            self.computing[request_id] = 0
            self.producer.begin(request_id, TTL)

    @rule(request_id=ids, final=st.booleans())
    def chunk(self, request_id: str, final: bool) -> None:
        if request_id in self.computing and request_id not in self.over:
            place = self.computing[request_id]
            self.computing[request_id] += 1
            if final:
                self.over.add(request_id)
            token = 7 if final else None
            self.took(self.producer.chunk(request_id, place, [place], place + 1, final, token, self.now))

    @rule(request_id=ids)
    def abort(self, request_id: str) -> None:
        if request_id in self.computing and request_id not in self.over:
            outcome = self.producer.abort(request_id, "why", self.now)
            self.over.add(request_id)
            self.took(outcome)

    @rule(client=clients, request_id=ids)
    def claim(self, client: bytes, request_id: str) -> None:
        if request_id not in self.ended and (request_id, client) not in self.reading:
            self.took(claim(self.producer, client, self.now, request_id))

    @rule(client=clients, request_ids=st.lists(ids, unique=True))
    def renew(self, client: bytes, request_ids: list[str]) -> None:
        outcome = self.producer.renew(client, Renew(LIFE, 1, request_ids), self.now)
        [(_, answer)] = outcome.send
        assert isinstance(answer, Renewed)
        for request_id in set(request_ids) - set(answer.gone):
            assert (request_id, client) in self.reading
            self.reading[request_id, client] = self.now + TTL

    @rule(client=clients, request_id=ids)
    def release(self, client: bytes, request_id: str) -> None:
        if (request_id, client) in self.reading:
            self.reading[request_id, client] = 0.0
        self.took(release(self.producer, client, self.now, request_id))

    @rule(seconds=st.sampled_from([0.5, 4.0, TTL]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.took(self.producer.expire(self.now))

    @invariant()
    def it_remembers_what_has_not_ended(self) -> None:
        assert len(self.producer) >= len(set(self.computing) - self.ended)

    def teardown(self) -> None:
        for request_id in set(self.computing) - self.over:
            self.abort(request_id)
        self.time_passes(2 * TTL)
        assert self.ended == set(self.computing), "blocks never go back"
        assert len(self.producer) == 0


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)

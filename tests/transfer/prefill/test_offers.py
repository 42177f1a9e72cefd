"""Blocks go back once, when nobody may be reading them any more; readers are told what there is."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tandem.transfer.prefill import offers as module
from tandem.transfer.prefill.offers import PUBLISHED_SECONDS, Action, OfferCorrupt, OfferEnded, Offers, Send
from tandem.wire.peer_messages import Claim, Claimed, KvComputed, KvGone, Release, Renew, Renewed

INCARNATION = "first"
TTL = 10.0
MAX_PUBLISHED = 4
A, B = b"\x01", b"\x02"


@pytest.fixture
def offers() -> Offers:
    return Offers(INCARNATION, TTL, MAX_PUBLISHED)


def claim(offers: Offers, client: bytes, now: float, request_id: str = "r") -> list[Action]:
    offers.claim(client, Claim(INCARNATION, request_id), now)
    return offers.drain()


def release(offers: Offers, client: bytes, now: float, request_id: str = "r") -> list[Action]:
    offers.release(client, Release(INCARNATION, [request_id]), now)
    return offers.drain()


def begin(offers: Offers, prompt: str | None = None, request_id: str = "r", *, published: bool = False) -> list[Action]:
    offers.begin(request_id, prompt, published=published)
    return offers.drain()


def chunk(
    offers: Offers, first: int, blocks: list[int], tokens: int, now: float, token: int | None = None
) -> list[Action]:
    """With the first token it is the last one."""
    offers.chunk("r", first, blocks, tokens, token is not None, token, now)
    return offers.drain()


def whole(offers: Offers, now: float = 0.0) -> list[Action]:
    """A prompt of one block."""
    return chunk(offers, 0, [1], 4, now, token=7)


def renew(offers: Offers, client: bytes, seq: int, request_ids: list[str], now: float) -> list[Action]:
    offers.renew(client, Renew(INCARNATION, seq, request_ids), now)
    return offers.drain()


def abort(offers: Offers, reason: str, now: float, request_id: str = "r") -> list[Action]:
    offers.abort(request_id, reason, now)
    return offers.drain()


def expire(offers: Offers, now: float) -> list[Action]:
    offers.expire(now)
    return offers.drain()


def kinds(actions: list[Action]) -> list[tuple[bytes, type]]:
    return [(action.client, type(action.message)) for action in actions if isinstance(action, Send)]


ENDED = [OfferEnded("r")]


def test_a_claim_before_the_request_is_answered_and_hears_of_every_chunk(offers: Offers) -> None:
    assert claim(offers, A, 0.0) == [Send(A, Claimed(INCARNATION, "r"))]
    begin(offers)
    first = chunk(offers, 0, [4, 5], 8, 1.0)
    assert first == [Send(A, KvComputed(INCARNATION, "r", 0, [4, 5], 8, False))]
    last = chunk(offers, 2, [6], 10, 2.0, token=77)
    assert last == [Send(A, KvComputed(INCARNATION, "r", 2, [6], 10, True, 77))]
    assert release(offers, A, 3.0) == ENDED


def test_a_late_claim_is_told_all_at_once_and_a_grown_block_once(offers: Offers) -> None:
    begin(offers)
    chunk(offers, 0, [4, 5], 7, 0.0)
    chunk(offers, 1, [5, 6], 10, 0.0, token=77)
    assert claim(offers, A, 1.0) == [
        Send(A, Claimed(INCARNATION, "r")),
        Send(A, KvComputed(INCARNATION, "r", 0, [4, 5, 6], 10, True, 77)),
    ]


def test_kv_that_nobody_waits_for_any_more_goes_back_at_once_unless_it_is_read(offers: Offers) -> None:
    """Its client has gone between prefill and decode; the decode engine may not have claimed it."""
    begin(offers)
    whole(offers)
    offers.withdraw("r", 1.0)
    assert expire(offers, 1.0) == ENDED
    begin(offers)
    claim(offers, A, 2.0)
    whole(offers, 2.0)
    offers.withdraw("r", 3.0)
    assert expire(offers, 3.0) == []
    assert release(offers, A, 4.0) == ENDED


def test_kv_that_is_computed_after_its_client_has_gone_waits_for_nobody(offers: Offers) -> None:
    """The word of it and the last chunk may cross."""
    begin(offers)
    offers.withdraw("r", 0.0)
    whole(offers, 1.0)
    assert expire(offers, 1.0) == ENDED
    offers.withdraw("r", 2.0)
    assert (offers.drain(), len(offers)) == ([], 0)


def test_the_answer_to_a_claim_carries_its_number(offers: Offers) -> None:
    offers.claim(A, Claim(INCARNATION, "r", number=5), 0.0)
    assert offers.drain() == [Send(A, Claimed(INCARNATION, "r", 5))]


def test_blocks_wait_for_the_last_of_several_readers(offers: Offers) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    claim(offers, B, 0.0)
    whole(offers)
    assert release(offers, A, 1.0) == []
    assert release(offers, A, 1.0) == []
    assert release(offers, B, 1.0) == ENDED
    assert len(offers) == 0


def test_a_release_by_somebody_who_never_claimed_changes_nothing(offers: Offers) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    whole(offers)
    assert release(offers, B, 1.0) == []
    assert release(offers, B, 1.0, "unknown") == []


def test_a_reader_that_lets_go_early_leaves_blocks_that_wait_for_nobody(offers: Offers) -> None:
    begin(offers, published=True)
    claim(offers, A, 0.0)
    assert release(offers, A, 1.0) == []
    assert whole(offers, 2.0) == []
    assert expire(offers, 2.0) == ENDED


def test_published_kv_that_nobody_claims_goes_back_after_a_longer_wait(offers: Offers) -> None:
    begin(offers, published=True)
    whole(offers, 5.0)
    assert expire(offers, 64.9) == []
    assert expire(offers, 65.0) == [OfferEnded("r", expired=False)]  # nobody was late


def test_a_silent_reader_is_told_and_counted_when_its_lease_ends(offers: Offers) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    whole(offers)
    actions = expire(offers, TTL)
    assert kinds(actions) == [(A, KvGone)]
    assert actions[1:] == [OfferEnded("r", expired=True)]


def test_a_prompt_that_is_still_being_computed_does_not_expire(offers: Offers) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    assert expire(offers, 100 * TTL) == []
    whole(offers, 100 * TTL)
    assert expire(offers, 100 * TTL) == []
    assert OfferEnded("r", expired=True) in expire(offers, 101 * TTL)


def test_a_renewal_keeps_what_is_held_and_names_what_is_gone(offers: Offers) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    whole(offers)
    held = ["r", "unknown"]
    assert renew(offers, A, 3, held, 9.0) == [Send(A, Renewed(INCARNATION, 3, ["unknown"]))]
    assert renew(offers, B, 3, held, 9.0) == [Send(B, Renewed(INCARNATION, 3, ["r", "unknown"]))]
    assert expire(offers, 18.9) == []
    assert expire(offers, 19.0)[1:] == [OfferEnded("r", expired=True)]


def test_an_abort_without_claims_gives_the_blocks_back_at_once(offers: Offers) -> None:
    begin(offers, published=True)
    chunk(offers, 0, [1], 4, 0.0)
    assert abort(offers, "why", 1.0) == []
    assert expire(offers, 1.0) == ENDED


def test_an_abort_tells_the_readers_and_waits_for_them(offers: Offers) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    chunk(offers, 0, [1], 4, 0.0)
    assert abort(offers, "why", 1.0) == [Send(A, KvGone(INCARNATION, "r", "why"))]
    assert expire(offers, 2.0) == []
    assert abort(offers, "again", 2.0) == []
    assert release(offers, A, 3.0) == ENDED
    assert expire(offers, 100.0) == []


def test_an_abort_after_the_last_chunk_changes_nothing(offers: Offers) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    whole(offers)
    assert abort(offers, "why", 1.0) == []
    assert abort(offers, "why", 1.0, "unknown") == []


@pytest.mark.parametrize("computed", [False, True], ids=["before any chunk", "after a chunk"])
def test_a_claim_after_an_abort_is_told_that_there_is_no_kv(offers: Offers, computed: bool) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    if computed:
        chunk(offers, 0, [1], 4, 0.0)
    abort(offers, "why", 1.0)
    assert claim(offers, B, 2.0) == [Send(B, KvGone(INCARNATION, "r", "why"))]
    assert release(offers, A, 3.0) == ENDED


def test_a_claim_whose_request_never_comes_is_told_so(offers: Offers) -> None:
    claim(offers, A, 0.0)
    assert expire(offers, TTL - 0.1) == []
    actions = expire(offers, TTL)
    assert (kinds(actions), len(actions)) == ([(A, KvGone)], 1)
    assert len(offers) == 0
    assert expire(offers, 2 * TTL) == []


def test_a_request_that_came_in_time_does_not_end_with_the_patience_for_its_claim(offers: Offers) -> None:
    claim(offers, A, 0.0)
    begin(offers)
    assert expire(offers, 5 * TTL) == []
    assert kinds(whole(offers, 5 * TTL)) == [(A, KvComputed)]


def test_claims_of_requests_that_never_come_are_bounded(offers: Offers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_EARLY_CLAIMS", 3)
    answers = [claim(offers, A, 0.0, str(number)) for number in range(5)]
    assert [kinds(answer)[0][1] for answer in answers] == [Claimed] * 3 + [KvGone] * 2
    assert len(offers) == 3
    begin(offers, request_id="0")
    assert kinds(claim(offers, A, 0.0, "6")) == [(A, Claimed)]
    expire(offers, TTL)
    assert kinds(claim(offers, A, TTL, "7")) == [(A, Claimed)]


@pytest.mark.parametrize("claimed_first", [True, False])
def test_kv_of_another_prompt_is_not_given_to_a_reader(offers: Offers, claimed_first: bool) -> None:
    answers = [claim(offers, A, 0.0)] if claimed_first else []
    answers.append(begin(offers, "digest"))
    if not claimed_first:
        answers.append(claim(offers, A, 0.0))
    assert kinds(answers[-1]) == [(A, KvGone)]
    offers.claim(B, Claim(INCARNATION, "r", "digest"), 0.0)
    assert kinds(offers.drain()) == [(B, Claimed)]
    assert kinds(whole(offers)) == [(B, KvComputed)]
    release(offers, A, 0.0)
    assert release(offers, B, 0.0) == ENDED


def test_a_claim_that_is_not_early_is_told_at_once_that_there_is_nothing(offers: Offers) -> None:
    offers.claim(A, Claim(INCARNATION, "r", early=False), 0.0)
    assert kinds(offers.drain()) == [(A, KvGone)]
    assert len(offers) == 0


def test_damage_is_told_by_those_who_read_and_before_the_blocks_go(offers: Offers) -> None:
    begin(offers)
    claim(offers, A, 0.0)
    whole(offers)
    offers.release(B, Release(INCARNATION, ["r"], ["r"]), 1.0)
    assert offers.drain() == []
    offers.release(A, Release(INCARNATION, ["r", "unknown"], ["r", "unknown"]), 1.0)
    assert offers.drain() == [OfferCorrupt("r"), *ENDED]


class Interleavings(RuleBasedStateMachine):
    """Any order of events. A model keeps for each request who may be reading it, and until when."""

    ids = st.sampled_from(["r0", "r1", "r2"])
    clients = st.sampled_from([A, B])

    def __init__(self) -> None:
        super().__init__()
        self.offers = Offers(INCARNATION, TTL, MAX_PUBLISHED)
        self.now = 0.0
        self.computing: dict[str, int] = {}  # chunks so far
        self.over: set[str] = set()  # nothing more is computed
        self.ended: set[str] = set()
        self.reading: dict[tuple[str, bytes], float] = {}

    def took(self, actions: list[Action]) -> None:
        for request_id in [action.request_id for action in actions if isinstance(action, OfferEnded)]:
            assert request_id in self.over, "blocks go back while they are being filled"
            assert request_id not in self.ended, "blocks go back twice"
            self.ended.add(request_id)
            late = [until for (name, _), until in self.reading.items() if name == request_id and until > self.now]
            assert not late, "blocks go back although somebody may be reading them"
        for client, message in [(action.client, action.message) for action in actions if isinstance(action, Send)]:
            if isinstance(message, Claimed):
                self.reading[message.request_id, client] = self.now + TTL
            elif isinstance(message, KvComputed):
                assert message.request_id not in self.ended
                assert message.final == (message.request_id in self.over)

    @rule(request_id=ids, published=st.booleans())
    def begin(self, request_id: str, published: bool) -> None:
        if request_id not in self.computing:
            self.computing[request_id] = 0
            self.offers.begin(request_id, published=published)

    @rule(request_id=ids, final=st.booleans())
    def chunk(self, request_id: str, final: bool) -> None:
        if request_id in self.computing and request_id not in self.over:
            place = self.computing[request_id]
            self.computing[request_id] += 1
            if final:
                self.over.add(request_id)
            token = 7 if final else None
            self.offers.chunk(request_id, place, [place], place + 1, final, token, self.now)
            self.took(self.offers.drain())

    @rule(request_id=ids)
    def abort(self, request_id: str) -> None:
        if request_id in self.computing and request_id not in self.over:
            actions = abort(self.offers, "why", self.now, request_id)
            self.over.add(request_id)
            self.took(actions)

    @rule(client=clients, request_id=ids)
    def claim(self, client: bytes, request_id: str) -> None:
        if request_id not in self.ended and (request_id, client) not in self.reading:
            self.took(claim(self.offers, client, self.now, request_id))

    @rule(client=clients, request_ids=st.lists(ids, unique=True))
    def renew(self, client: bytes, request_ids: list[str]) -> None:
        [action] = renew(self.offers, client, 1, request_ids, self.now)
        assert isinstance(action, Send)
        answer = action.message
        assert isinstance(answer, Renewed)
        for request_id in set(request_ids) - set(answer.gone):
            assert (request_id, client) in self.reading
            self.reading[request_id, client] = self.now + TTL

    @rule(client=clients, request_id=ids)
    def release(self, client: bytes, request_id: str) -> None:
        if (request_id, client) in self.reading:
            self.reading[request_id, client] = 0.0
        self.took(release(self.offers, client, self.now, request_id))

    @rule(seconds=st.sampled_from([0.5, 4.0, TTL]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.took(expire(self.offers, self.now))

    @invariant()
    def it_remembers_what_has_not_ended(self) -> None:
        assert len(self.offers) >= len(set(self.computing) - self.ended)

    def teardown(self) -> None:
        for request_id in set(self.computing) - self.over:
            self.abort(request_id)
        self.time_passes(PUBLISHED_SECONDS + TTL)
        assert self.ended == set(self.computing), "blocks never go back"
        assert len(self.offers) == 0


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)

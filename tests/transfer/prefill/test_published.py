"""KV that was published and that nobody fetches is in nobody's way for long; KV that a reader holds never gives way."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.transfer.prefill.offers import PUBLISHED_SECONDS, OfferEnded, Offers
from tandem.transfer.prefill.published import UnclaimedKv
from tandem.wire.peer_messages import Claim, KvGone, Release

LIFE, TTL, LIMIT = "life", 10.0, 6
READER = b"\x01"


def publish(offers: Offers, name: str, blocks: list[int], now: float = 0.0) -> list[OfferEnded]:
    offers.begin(name, published=True)
    offers.chunk(name, 0, blocks, 4 * len(blocks), True, 7, now)
    return ended(offers)


def ended(offers: Offers) -> list[OfferEnded]:
    return [action for action in offers.drain() if isinstance(action, OfferEnded)]


def claim(offers: Offers, name: str, now: float = 0.0) -> None:
    offers.claim(READER, Claim(LIFE, name), now)
    offers.drain()


def expire(offers: Offers, now: float) -> list[OfferEnded]:
    offers.expire(now)
    return ended(offers)


def test_beyond_its_share_the_oldest_gives_way_and_a_later_claim_is_told_so() -> None:
    offers = Offers(LIFE, TTL, LIMIT)
    assert publish(offers, "a", [0, 1, 2]) == publish(offers, "b", [3, 4, 5]) == []
    assert publish(offers, "c", [6]) == [OfferEnded("a", gave_way=True)]
    offers.claim(READER, Claim(LIFE, "a", early=False), 1.0)
    [answer] = offers.drain()
    assert isinstance(getattr(answer, "message", None), KvGone)


def test_blocks_that_prompts_share_count_once() -> None:
    offers = Offers(LIFE, TTL, LIMIT)
    assert [publish(offers, name, [0, 1, 2, 3, block]) for name, block in (("a", 4), ("b", 5))] == [[], []]
    assert publish(offers, "c", [0, 1, 2, 3, 6]) == [OfferEnded("a", gave_way=True)]


def test_what_was_claimed_does_not_count_and_does_not_give_way() -> None:
    offers = Offers(LIFE, TTL, LIMIT)
    publish(offers, "claimed", [0, 1, 2, 3])
    claim(offers, "claimed")
    publish(offers, "a", [4, 5, 6, 7])
    assert publish(offers, "b", [8, 9, 10]) == [OfferEnded("a", gave_way=True)]
    assert offers.knows("claimed")


def test_kv_for_a_router_does_not_count() -> None:
    offers = Offers(LIFE, TTL, 0)
    offers.begin("a")
    offers.chunk("a", 0, [0, 1], 8, True, 7, 0.0)
    assert ended(offers) == []


def test_a_reader_that_claimed_and_let_go_before_the_end_leaves_nothing_that_counts() -> None:
    offers = Offers(LIFE, TTL, LIMIT)
    offers.begin("a", published=True)
    claim(offers, "a")
    offers.release(READER, Release(LIFE, ["a"]), 0.0)
    offers.chunk("a", 0, [0, 1, 2, 3], 16, True, 7, 0.0)
    assert publish(offers, "b", [4, 5, 6, 7]) == []
    assert [one.request_id for one in expire(offers, 0.0)] == ["a"]


def test_while_a_request_waits_for_room_it_waits_no_longer_than_any_other_kv() -> None:
    offers = Offers(LIFE, TTL, LIMIT)
    publish(offers, "a", [0], now=0.0)
    publish(offers, "b", [1], now=5.0)
    assert expire(offers, TTL) == []
    offers.short_of_blocks = True
    assert expire(offers, TTL) == [OfferEnded("a", gave_way=True)]
    assert expire(offers, TTL + 4.9) == []
    assert expire(offers, TTL + 5.0) == [OfferEnded("b", gave_way=True)]


def test_otherwise_it_waits_for_its_reader() -> None:
    offers = Offers(LIFE, TTL, LIMIT)
    publish(offers, "a", [0])
    assert expire(offers, PUBLISHED_SECONDS - 0.1) == []
    assert expire(offers, PUBLISHED_SECONDS) == [OfferEnded("a")]
    assert publish(offers, "b", list(range(LIMIT))) == []  # nothing of the first one counts any more


EVENTS = st.one_of(
    st.tuples(st.just("publish"), st.lists(st.integers(0, 20), min_size=1, max_size=LIMIT, unique=True)),
    st.tuples(st.sampled_from(["claim", "release"]), st.integers(0, 30)),
    st.tuples(st.just("wait"), st.sampled_from([0.5, TTL, PUBLISHED_SECONDS])),
    st.tuples(st.just("short"), st.booleans()),
)


@given(st.lists(EVENTS, max_size=40))
def test_whatever_happens_the_share_is_kept_and_only_what_was_never_claimed_gives_way(
    events: list[tuple[str, object]],
) -> None:
    offers, now = Offers(LIFE, TTL, LIMIT), 0.0
    blocks_of: dict[str, list[int]] = {}
    claimed: set[str] = set()
    over: set[str] = set()
    for event, value in events:
        name = f"r{value}"
        if event == "publish":
            name = f"r{len(blocks_of)}"
            blocks_of[name] = list(value)  # type: ignore[call-overload]
            offers.begin(name, published=True)
            offers.chunk(name, 0, blocks_of[name], 4, True, 7, now)
        elif event == "claim":
            offers.claim(READER, Claim(LIFE, name, early=False), now)
            claimed |= {name} if offers.knows(name) else set()
        elif event == "release":
            offers.release(READER, Release(LIFE, [name]), now)
        elif event == "wait":
            now += float(value)  # type: ignore[arg-type]
            offers.expire(now)
        else:
            offers.short_of_blocks = bool(value)
        for end in ended(offers):
            assert end.request_id not in over
            assert not (end.gave_way and end.request_id in claimed)
            over.add(end.request_id)
        held = {block for name in blocks_of.keys() - over - claimed for block in blocks_of[name]}
        assert len(held) <= LIMIT
    offers.expire(now + PUBLISHED_SECONDS)
    assert over | {end.request_id for end in ended(offers)} == set(blocks_of)


@given(st.lists(st.tuples(st.integers(0, 5), st.sets(st.integers(0, 9), min_size=1)), max_size=30))
def test_the_count_of_blocks_is_that_of_a_set(changes: list[tuple[int, set[int]]]) -> None:
    waiting, model = UnclaimedKv(5), dict[str, set[int]]()
    for number, blocks in changes:
        if (name := str(number)) in model:
            waiting.remove(name)
            del model[name]
        else:
            waiting.add(name, list(blocks), 0.0)
            model[name] = blocks
        assert waiting.blocks == len(set().union(*model.values()))
        assert waiting.excess() == (next(iter(model)) if waiting.blocks > 5 else None)

"""Several routers introduce prefill engines; what one of them does not know, another one may need."""

from __future__ import annotations

from tandem.engine.io.introductions import Introductions
from tandem.ids import EngineIdentity
from tandem.wire.engine_status import MAX_PEERS
from tandem.wire.messages import Address, Introduce, PeerAddress


def peer(name: str, life: str = "1") -> PeerAddress:
    return PeerAddress(EngineIdentity(name, life), Address("127.0.0.1", 9))


P0, P1 = peer("p0"), peer("p1")


def test_each_engine_is_introduced_once_whoever_knows_it() -> None:
    known = Introductions()
    assert known.add(0, Introduce([P0])) == Introduce([P0])
    assert known.add(1, Introduce([P0, P1])) == Introduce([P0, P1])


def test_a_router_that_has_restarted_and_knows_nobody_takes_nobody_from_the_other_one() -> None:
    known = Introductions()
    known.add(0, Introduce([P0, P1]))
    known.add(1, Introduce([P0, P1]))
    known.forget(0)
    assert known.add(0, Introduce([])) == Introduce([P0, P1])


def test_what_no_router_knows_any_more_is_gone() -> None:
    known = Introductions()
    known.add(0, Introduce([P0, P1]))
    known.add(1, Introduce([P0]))
    assert known.add(0, Introduce([P0])) == Introduce([P0])


def test_a_router_that_is_gone_keeps_nobody() -> None:
    known = Introductions()
    known.add(0, Introduce([peer("p0", "earlier")]))
    known.forget(0)
    known.forget(7)
    assert known.add(1, Introduce([P0])) == Introduce([P0])


def test_no_more_than_fit_into_a_message_are_taken() -> None:
    known = Introductions()
    known.add(0, Introduce([peer("of 0", str(life)) for life in range(MAX_PEERS)]))
    assert len(known.add(1, Introduce([peer("of 1", str(life)) for life in range(MAX_PEERS)])).peers) == MAX_PEERS

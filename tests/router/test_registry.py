"""What a frontend knows of its engines; the clock is a number."""

from __future__ import annotations

from tandem.ids import EngineIdentity
from tandem.router.registry import EngineRegistry, EngineState
from tandem.wire.messages import PeerInfo
from tests.router.scene import make_register, make_status

FIRST, SECOND = EngineIdentity("d0", "first"), EngineIdentity("d0", "second")


def registered() -> EngineRegistry:
    pool = EngineRegistry(patience=5.0, memory=60.0)
    assert pool.register(b"a", make_register(FIRST, "decode"), now=0.0) == []
    return pool


def test_a_registered_engine_is_ready() -> None:
    pool = registered()
    assert [member.incarnation for member in pool.ready("decode")] == ["first"]
    assert pool.ready("prefill") == []
    assert pool.find("d0") is pool.find("d0", "first") is pool.get(b"a")
    assert pool.find("d0", "second") is None


def test_registering_again_changes_nothing_but_the_clock() -> None:
    pool = registered()
    member = pool.get(b"a")
    assert pool.register(b"a", make_register(FIRST, "decode"), now=4.0) == []
    assert pool.get(b"a") is member
    assert pool.expire(8.0) == []


def test_a_new_life_takes_the_place_of_the_earlier_one() -> None:
    pool = registered()
    [earlier] = pool.register(b"b", make_register(SECOND, "decode"), now=1.0)
    assert (earlier.incarnation, earlier.state) == ("first", EngineState.LOST)
    assert [member.incarnation for member in pool] == ["second"]
    assert pool.heard(b"a", make_status(FIRST, "decode"), now=2.0) is None


def test_a_new_life_on_the_same_route_takes_the_place_too() -> None:
    pool = registered()
    [earlier] = pool.register(b"a", make_register(SECOND, "decode"), now=1.0)
    assert earlier.incarnation == "first"
    assert [member.incarnation for member in pool] == ["second"]


def test_a_silent_engine_is_lost_once_and_forgotten_later() -> None:
    pool = registered()
    assert pool.expire(5.0) == []
    [lost] = pool.expire(5.1)
    assert lost.state is EngineState.LOST
    assert pool.expire(5.2) == []
    assert pool.ready("decode") == []
    assert [member.engine_id for member in pool] == ["d0"]
    pool.expire(60.1)
    assert list(pool) == []


def test_an_engine_that_is_heard_again_is_ready_again() -> None:
    pool = registered()
    pool.expire(6.0)
    assert pool.heard(b"a", make_status(FIRST, "decode"), now=7.0) is not None
    assert [member.engine_id for member in pool.ready("decode")] == ["d0"]
    assert pool.expire(11.9) == []


def test_a_heartbeat_brings_status_and_peers() -> None:
    pool = registered()
    peer = PeerInfo("p0", "x", "ready")
    member = pool.heard(b"a", make_status(FIRST, "decode", peers=[peer]), now=1.0)
    assert member is not None
    assert member.peers == {("p0", "x"): peer}


def test_a_heartbeat_of_another_life_is_not_taken() -> None:
    pool = registered()
    assert pool.heard(b"a", make_status(SECOND, "decode"), now=1.0) is None
    assert pool.heard(b"z", make_status(FIRST, "decode"), now=1.0) is None


def test_an_engine_that_leaves_is_gone_at_once() -> None:
    pool = registered()
    member = pool.leave(b"a")
    assert member is not None
    assert member.state is EngineState.LEAVING
    assert list(pool) == []
    assert pool.leave(b"a") is None

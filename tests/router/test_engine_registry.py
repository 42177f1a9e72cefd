"""The engines that a frontend knows; the clock is a number."""

from __future__ import annotations

from tandem.api.backend import EngineState
from tandem.ids import EngineIdentity
from tandem.router.engine_registry import ALIVE_SECONDS, MAX_ENGINES, EngineRegistry
from tandem.wire.engine_status import PeerInfo
from tests.support.registrations import make_register, make_status

FIRST, SECOND = EngineIdentity("d0", "first"), EngineIdentity("d0", "second")


def registered() -> EngineRegistry:
    registry = EngineRegistry(patience=5.0, memory=60.0)
    assert registry.register(b"a", make_register(FIRST, "decode"), now=0.0) == []
    return registry


def test_a_registered_engine_is_ready() -> None:
    registry = registered()
    assert [engine.incarnation for engine in registry.ready("decode")] == ["first"]
    assert registry.ready("prefill") == []
    assert registry.ready() == registry.ready("decode") == [registry.get(b"a")]


def test_registering_again_changes_nothing_but_the_clock() -> None:
    registry = registered()
    engine = registry.get(b"a")
    assert registry.register(b"a", make_register(FIRST, "decode"), now=4.0) == []
    assert registry.get(b"a") is engine
    assert registry.expire(8.0) == []


def test_a_new_incarnation_takes_the_place_of_the_earlier_one() -> None:
    registry = registered()
    [earlier] = registry.register(b"b", make_register(SECOND, "decode"), now=1.0)
    assert earlier.incarnation == "first"
    assert [engine.incarnation for engine in registry] == ["second"]
    assert registry.heartbeat(b"a", make_status(FIRST, "decode"), now=2.0) is None


def test_a_new_incarnation_on_the_same_connection_takes_the_place_too() -> None:
    registry = registered()
    [earlier] = registry.register(b"a", make_register(SECOND, "decode"), now=1.0)
    assert earlier.incarnation == "first"
    assert [engine.incarnation for engine in registry] == ["second"]


def test_a_silent_engine_is_lost_once_and_forgotten_later() -> None:
    registry = registered()
    assert registry.expire(5.0) == []
    [lost] = registry.expire(5.1)
    assert lost.state is EngineState.LOST
    assert registry.expire(5.2) == []
    assert registry.ready("decode") == []
    assert [engine.engine_id for engine in registry] == ["d0"]
    registry.expire(60.1)
    assert list(registry) == []


def test_an_engine_that_is_heard_again_is_ready_again() -> None:
    registry = registered()
    registry.expire(6.0)
    assert registry.heartbeat(b"a", make_status(FIRST, "decode"), now=7.0) is not None
    assert [engine.engine_id for engine in registry.ready("decode")] == ["d0"]
    assert registry.expire(11.9) == []


def test_a_heartbeat_brings_status_and_peers() -> None:
    registry = registered()
    peer = PeerInfo("p0", "x", "ready")
    engine = registry.heartbeat(b"a", make_status(FIRST, "decode", peers=[peer]), now=1.0)
    assert engine is not None
    assert engine.peers == {("p0", "x"): peer}


def test_a_heartbeat_of_another_incarnation_is_not_taken() -> None:
    registry = registered()
    assert registry.heartbeat(b"a", make_status(SECOND, "decode"), now=1.0) is None
    assert registry.heartbeat(b"z", make_status(FIRST, "decode"), now=1.0) is None


def test_an_engine_that_leaves_is_gone_at_once() -> None:
    registry = registered()
    engine = registry.leave(b"a")
    assert engine is not None
    assert engine.incarnation == "first"
    assert list(registry) == []
    assert registry.leave(b"a") is None


def test_an_engine_of_the_same_name_is_a_second_one_only_while_the_first_is_alive() -> None:
    registry = registered()
    assert registry.living_namesake(make_register(FIRST, "decode"), now=0.0) is None
    assert registry.living_namesake(make_register(SECOND, "decode"), now=0.5 * ALIVE_SECONDS) is registry.get(b"a")
    assert registry.living_namesake(make_register(SECOND, "decode"), now=2 * ALIVE_SECONDS) is None


def test_an_engine_that_drains_is_there_but_takes_nothing_new() -> None:
    registry = registered()
    engine = registry.heartbeat(b"a", make_status(FIRST, "decode", draining=True), now=1.0)
    assert engine is not None
    assert engine.state is EngineState.DRAINING
    assert (registry.ready(), registry.present("decode")) == ([], [engine])
    assert registry.living_namesake(make_register(SECOND, "decode"), now=1.0) is engine, "its name is not free yet"
    assert registry.expire(6.5) == [engine], "and its silence is noticed"


def test_an_engine_that_drains_still_does_after_a_break_of_its_connection() -> None:
    registry = registered()
    registry.register(b"a", make_register(FIRST, "decode", draining=True), now=1.0)
    assert registry.ready() == []


def test_there_is_room_for_so_many_engines_and_not_for_one_more() -> None:
    registry = EngineRegistry()
    for number in range(MAX_ENGINES):
        message = make_register(EngineIdentity(f"e{number}", f"life{number}"), "decode")
        assert not registry.is_full(message)
        registry.register(f"life{number}".encode(), message, now=0.0)
    assert registry.is_full(make_register(EngineIdentity("one more", "life"), "decode"))
    assert not registry.is_full(make_register(EngineIdentity("e7", "a new life"), "decode")), "it replaces another one"
    registry.leave(b"life0")
    assert not registry.is_full(make_register(EngineIdentity("one more", "life"), "decode"))

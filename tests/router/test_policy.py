"""Which engines take a request, from plain data."""

from __future__ import annotations

from tandem.ids import EngineIdentity
from tandem.router.policy import Route, choose_route, choose_route_of_one_model
from tandem.router.registry import EngineEntry
from tandem.wire.messages import PeerInfo, RequestCounts
from tests.router.scene import make_register


def member(
    engine_id: str,
    role: str,
    *,
    active: int = 0,
    chosen: int = 0,
    waiting: int = 0,
    running: int = 0,
    fingerprint: str = "f",
) -> EngineEntry:
    register = make_register(
        EngineIdentity(engine_id, f"life-of-{engine_id}"),
        role,
        requests=RequestCounts(waiting=waiting, running=running),
        fingerprint=fingerprint,
    )
    return EngineEntry(b"route", register, register.status, 0.0, active=active, chosen=chosen)


def refuse(
    decode: EngineEntry, prefill: EngineEntry, state: str = "refused", error: str | None = "dtype differs"
) -> None:
    decode.peers[prefill.engine_id, prefill.incarnation] = PeerInfo(
        prefill.engine_id, prefill.incarnation, state, error
    )


def chosen(*members: EngineEntry, exclude: tuple[str, ...] = ()) -> tuple[str | None, str]:
    path = choose_route(members, exclude)
    assert isinstance(path, Route), path
    return (path.prefill.engine_id if path.prefill else None), path.decode.engine_id


def test_the_least_loaded_engine_of_each_role_is_chosen() -> None:
    engines = [member("p0", "prefill", active=2), member("p1", "prefill", active=1)]
    engines += [member("d0", "decode", waiting=1), member("d1", "decode", running=9)]
    assert chosen(*engines) == ("p1", "d1")


def test_among_equals_the_one_chosen_least_recently_goes_first() -> None:
    engines = [member("p0", "prefill", chosen=4), member("p1", "prefill", chosen=3), member("d0", "decode", chosen=4)]
    assert chosen(*engines) == ("p1", "d0")


def test_a_pair_goes_before_a_mixed_engine() -> None:
    pair = member("p0", "prefill", active=5), member("d0", "decode", active=5)
    assert chosen(*pair, member("m0", "mixed")) == ("p0", "d0")


def test_a_mixed_engine_takes_what_no_pair_can() -> None:
    prefill, decode = member("p0", "prefill"), member("d0", "decode")
    assert chosen(prefill, member("m0", "mixed")) == (None, "m0")
    refuse(decode, prefill)
    assert chosen(prefill, decode, member("m0", "mixed")) == (None, "m0")


def test_a_refused_pair_is_passed_over_for_a_busier_one() -> None:
    p0, p1 = member("p0", "prefill"), member("p1", "prefill", active=9)
    decode = member("d0", "decode")
    refuse(decode, p0)
    assert chosen(p0, p1, decode) == ("p1", "d0")


def test_a_pair_whose_session_was_lost_is_made_only_where_there_is_nothing_else() -> None:
    prefill, decode = member("p0", "prefill"), member("d0", "decode")
    refuse(decode, prefill, "lost")
    assert chosen(prefill, decode) == ("p0", "d0")
    assert chosen(prefill, decode, member("m0", "mixed")) == (None, "m0")


def test_a_pair_whose_session_was_lost_is_passed_over_and_a_connecting_one_is_not() -> None:
    p0, p1, decode = member("p0", "prefill"), member("p1", "prefill", active=9), member("d0", "decode")
    refuse(decode, p0, "lost")
    refuse(decode, p1, "connecting", None)
    assert chosen(p0, p1, decode) == ("p1", "d0")


def test_what_an_earlier_life_refused_does_not_count() -> None:
    prefill, decode = member("p0", "prefill"), member("d0", "decode")
    decode.peers["p0", "another-life"] = PeerInfo("p0", "another-life", "refused", "dtype differs")
    assert chosen(prefill, decode) == ("p0", "d0")


def test_excluded_engines_are_not_chosen() -> None:
    prefill = member("p0", "prefill")
    engines = [prefill, member("d0", "decode"), member("d1", "decode", active=9)]
    assert chosen(*engines, exclude=("life-of-d0",)) == ("p0", "d1")


def test_it_says_what_is_missing() -> None:
    assert choose_route([]) == "no prefill and no decode engine is ready"
    assert choose_route([member("p0", "prefill")]) == "no decode engine is ready"
    assert choose_route([member("d0", "decode")]) == "no prefill engine is ready"


def test_it_says_why_no_pair_fits() -> None:
    prefill, decode = member("p0", "prefill"), member("d0", "decode")
    refuse(decode, prefill)
    assert choose_route([prefill, decode]) == (
        "no prefill engine fits a decode engine: d0 cannot read from p0: dtype differs"
    )


def of_weights(
    *members: EngineEntry, exclude: tuple[str, ...] = (), current: str | None = None
) -> tuple[str | None, str | None]:
    """Who decodes, and the fingerprint that is served."""
    path, weights = choose_route_of_one_model(members, exclude, current)
    return (path.decode.engine_id if isinstance(path, Route) else None), weights


OLD = member("old", "mixed", active=5, fingerprint="1")
NEW = member("new", "mixed", fingerprint="2")


def test_engines_of_other_weights_under_the_same_name_are_not_used_however_free() -> None:
    assert of_weights(OLD, NEW) == ("old", "1")
    assert of_weights(NEW, OLD, current="1") == ("old", "1")


def test_new_weights_take_over_once_the_old_ones_have_no_path() -> None:
    assert of_weights(NEW, current="1") == ("new", "2")
    prefill = member("p0", "prefill", fingerprint="1")
    assert of_weights(prefill, NEW, current="1") == ("new", "2")


def test_a_prefill_and_a_decode_engine_of_different_weights_are_no_pair_even_before_they_say_so() -> None:
    prefill, decode = member("p0", "prefill", fingerprint="1"), member("d0", "decode", fingerprint="2")
    path, _ = choose_route_of_one_model([prefill, decode])
    assert path == "no path through engines of the same weights: p0 (prefill) has 1, d0 (decode) has 2"
    refuse(decode, prefill, error="fingerprint differs: ours is 2, theirs 1")
    path, _ = choose_route_of_one_model([prefill, decode])
    assert "d0 cannot read from p0: fingerprint differs" in str(path)

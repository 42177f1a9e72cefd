"""Routing policies, from plain data."""

from __future__ import annotations

from dataclasses import replace

from tandem.ids import EngineIdentity
from tandem.router.engine_registry import EngineEntry, EngineRegistry
from tandem.router.policy import ANY_PROMPT, NoRoute, OneModelPolicy, Prompt, Route, SingleEnginePolicy, choose_route
from tandem.wire.engine_status import PeerInfo, RequestCounts
from tests.support.registrations import make_register

PAIRS = ("p0", "p1", "d0", "d1")


def engine(
    engine_id: str,
    role: str,
    *,
    active: int = 0,
    prompt_tokens: int = 0,
    last_chosen: int = 0,
    waiting: int = 0,
    running: int = 0,
    fingerprint: str = "f",
) -> EngineEntry:
    register = make_register(
        EngineIdentity(engine_id, f"incarnation-of-{engine_id}"),
        role,
        requests=RequestCounts(waiting=waiting, running=running),
        fingerprint=fingerprint,
    )
    entry = EngineEntry(b"route", register, register.status, 0.0, active=active, last_chosen=last_chosen)
    entry.prompt_tokens = prompt_tokens
    return entry


def refuse(
    decode: EngineEntry, prefill: EngineEntry, state: str = "refused", error: str | None = "dtype differs"
) -> None:
    decode.peers[prefill.engine_id, prefill.incarnation] = PeerInfo(
        prefill.engine_id, prefill.incarnation, state, error
    )


def chosen(*engines: EngineEntry, exclude: tuple[str, ...] = (), prompt: Prompt = ANY_PROMPT) -> tuple[str | None, str]:
    return names(choose_route(engines, exclude, prompt))


def names(route: Route | NoRoute) -> tuple[str | None, str]:
    assert isinstance(route, Route), route
    return (route.prefill.engine_id if route.prefill else None), route.decode.engine_id


def test_the_least_loaded_engine_of_each_role_is_chosen() -> None:
    engines = [engine("p0", "prefill", active=2), engine("p1", "prefill", active=1)]
    engines += [engine("d0", "decode", waiting=1), engine("d1", "decode", running=9)]
    assert chosen(*engines) == ("p1", "d1")


def test_among_equals_the_one_chosen_least_recently_goes_first() -> None:
    engines = [
        engine("p0", "prefill", last_chosen=4),
        engine("p1", "prefill", last_chosen=3),
        engine("d0", "decode", last_chosen=4),
    ]
    assert chosen(*engines) == ("p1", "d0")


def cached(tokens: int, **engines: int) -> Prompt:
    """Return a prompt of so many tokens, and how many of them engines have cached."""
    return Prompt(tokens, {f"incarnation-of-{name}": count for name, count in engines.items()})


def test_a_request_goes_where_the_beginning_of_its_prompt_is_cached() -> None:
    engines = [engine(name, "prefill" if name[0] == "p" else "decode", last_chosen=int(name[1])) for name in PAIRS]
    assert chosen(*engines) == ("p0", "d0")
    assert chosen(*engines, prompt=cached(100, p1=64, d1=64)) == ("p1", "d1")


def test_a_prefill_engine_with_less_to_compute_goes_before_one_that_has_the_prompt_cached() -> None:
    engines = [engine("p0", "prefill"), engine("p1", "prefill", active=1, prompt_tokens=60), engine("d0", "decode")]
    assert chosen(*engines, prompt=cached(100, p1=64)) == ("p1", "d0")  # 60 + 36 tokens against 100
    assert chosen(*engines, prompt=cached(100, p1=60)) == ("p0", "d0")
    engines[1].prompt_tokens = 65
    assert chosen(*engines, prompt=cached(100, p1=64)) == ("p0", "d0")


def test_requests_of_other_frontends_count_as_prompts_like_this_one() -> None:
    engines = [engine("p0", "prefill", running=1), engine("p1", "prefill", active=1, prompt_tokens=99, running=1)]
    assert chosen(*engines, engine("d0", "decode"), prompt=cached(100)) == ("p1", "d0")


def test_a_cached_prompt_is_worth_less_than_a_request_more() -> None:
    engines = [engine("m0", "mixed"), engine("m1", "mixed", active=1)]
    assert chosen(*engines, prompt=cached(100, m1=99)) == (None, "m0")
    assert chosen(engine("m2", "mixed", active=1), engines[1], prompt=cached(100, m1=64)) == (None, "m1")


def test_a_route_says_what_its_prefill_engine_has_to_compute() -> None:
    route = choose_route([engine("p0", "prefill"), engine("d0", "decode")], prompt=cached(100, p0=64))
    assert isinstance(route, Route)
    assert route.prompt_tokens == 36


def test_a_pair_goes_before_a_mixed_engine() -> None:
    pair = engine("p0", "prefill", active=5), engine("d0", "decode", active=5)
    assert chosen(*pair, engine("m0", "mixed")) == ("p0", "d0")


def test_a_mixed_engine_takes_what_no_pair_can() -> None:
    prefill, decode = engine("p0", "prefill"), engine("d0", "decode")
    assert chosen(prefill, engine("m0", "mixed")) == (None, "m0")
    refuse(decode, prefill)
    assert chosen(prefill, decode, engine("m0", "mixed")) == (None, "m0")


def test_a_refused_pair_is_passed_over_for_a_busier_one() -> None:
    p0, p1 = engine("p0", "prefill"), engine("p1", "prefill", active=9)
    decode = engine("d0", "decode")
    refuse(decode, p0)
    assert chosen(p0, p1, decode) == ("p1", "d0")


def test_a_pair_whose_session_was_lost_is_made_only_where_there_is_nothing_else() -> None:
    prefill, decode = engine("p0", "prefill"), engine("d0", "decode")
    refuse(decode, prefill, "lost")
    assert chosen(prefill, decode) == ("p0", "d0")
    assert chosen(prefill, decode, engine("m0", "mixed")) == (None, "m0")


def test_a_pair_whose_session_was_lost_is_passed_over_and_a_connecting_one_is_not() -> None:
    p0, p1, decode = engine("p0", "prefill"), engine("p1", "prefill", active=9), engine("d0", "decode")
    refuse(decode, p0, "lost")
    refuse(decode, p1, "connecting", None)
    assert chosen(p0, p1, decode) == ("p1", "d0")


def test_what_an_earlier_incarnation_refused_does_not_count() -> None:
    prefill, decode = engine("p0", "prefill"), engine("d0", "decode")
    decode.peers["p0", "another-incarnation"] = PeerInfo("p0", "another-incarnation", "refused", "dtype differs")
    assert chosen(prefill, decode) == ("p0", "d0")


def test_excluded_engines_are_not_chosen() -> None:
    prefill = engine("p0", "prefill")
    engines = [prefill, engine("d0", "decode"), engine("d1", "decode", active=9)]
    assert chosen(*engines, exclude=("incarnation-of-d0",)) == ("p0", "d1")


def test_it_says_what_is_missing() -> None:
    assert choose_route([]) == NoRoute("no prefill and no decode engine is ready")
    assert choose_route([engine("p0", "prefill")]) == NoRoute("no decode engine is ready")
    assert choose_route([engine("d0", "decode")], alone=False) == NoRoute("no prefill engine is ready")


def test_it_says_why_no_pair_fits() -> None:
    prefill, decode = engine("p0", "prefill"), engine("d0", "decode")
    refuse(decode, prefill)
    assert choose_route([prefill, decode]) == NoRoute(
        "no prefill engine fits a decode engine: d0 cannot read from p0: dtype differs", may_come=False
    )


def registered(*engines: EngineEntry) -> EngineRegistry:
    registry = EngineRegistry()
    for entry in engines:
        registry.register(entry.engine_id.encode(), entry.register, now=0.0)
    return registry


def decodes(policy: OneModelPolicy, exclude: tuple[str, ...] = (), fingerprint: str | None = None) -> str | None:
    route = policy.choose(exclude, fingerprint)
    return route.decode.engine_id if isinstance(route, Route) else None


OLD, NEW = engine("old", "mixed", fingerprint="1"), engine("new", "mixed", fingerprint="2")


def test_engines_of_other_weights_under_the_same_name_are_not_used_however_free() -> None:
    registry = registered(OLD, NEW)
    policy = OneModelPolicy(registry)
    assert decodes(policy) == "old"
    registry.ready()[0].active = 5
    assert decodes(policy) == "old"


def test_weights_that_are_served_stay_though_others_registered_first() -> None:
    registry = registered(NEW)
    policy = OneModelPolicy(registry)
    assert decodes(policy) == "new"
    registry.leave(b"new")
    registry.register(b"old", OLD.register, now=0.0)
    assert decodes(policy) == "old"
    registry.register(b"new", NEW.register, now=0.0)
    assert decodes(policy) == "old"


def test_new_weights_take_over_once_the_old_ones_have_no_route() -> None:
    registry = registered(OLD, NEW, engine("p0", "prefill", fingerprint="1"))
    policy = OneModelPolicy(registry)
    assert decodes(policy) == "old"
    registry.leave(b"old")
    assert decodes(policy) == "new"
    registry.register(b"old", OLD.register, now=0.0)
    assert decodes(policy) == "new"


def test_what_one_request_excludes_changes_no_weights_for_the_others() -> None:
    policy = OneModelPolicy(registered(OLD, NEW))
    assert decodes(policy, exclude=("incarnation-of-old",)) == "new"
    assert decodes(policy) == "old"


def test_a_request_with_output_goes_on_with_the_weights_that_made_it() -> None:
    policy = OneModelPolicy(registered(OLD, NEW))
    assert decodes(policy, fingerprint="2") == "new"
    assert decodes(policy, exclude=("incarnation-of-new",), fingerprint="2") is None


def test_engines_of_another_model_are_not_used_and_said_to_be_there() -> None:
    other = make_register(EngineIdentity("d0", "x"), "decode", model="another")
    registry = registered(engine("p0", "prefill"))
    registry.register(b"d0", other, now=0.0)
    assert OneModelPolicy(registry).choose() == NoRoute(
        "no decode engine is ready; 1 engines of other models than tiny are not used"
    )


def test_a_prefill_and_a_decode_engine_of_different_weights_are_no_pair_even_before_they_say_so() -> None:
    prefill, decode = engine("p0", "prefill", fingerprint="1"), engine("d0", "decode", fingerprint="2")
    registry = registered(prefill, decode)
    assert OneModelPolicy(registry).choose() == NoRoute(
        "no route through engines of the same weights: p0 (prefill) has 1, d0 (decode) has 2"
    )
    refuse(registry.ready("decode")[0], prefill, error="fingerprint differs: ours is 2, theirs 1")
    route = OneModelPolicy(registry).choose()
    assert isinstance(route, NoRoute)
    assert "d0 cannot read from p0: fingerprint differs" in route.reason


def test_an_engines_own_api_uses_that_engine_whatever_its_role() -> None:
    registry = registered(engine("p0", "prefill"))
    policy = SingleEnginePolicy(registry)
    assert policy.choose() == Route(registry.ready()[0], reason="sent to this engine directly")
    assert policy.choose(("incarnation-of-p0",)) == NoRoute("the engine is not ready")


def test_where_no_prefill_engine_is_ready_decode_engines_serve_alone() -> None:
    busy, idle, mixed = engine("d0", "decode", active=3), engine("d1", "decode"), engine("m0", "mixed")
    alone = Route(idle, reason="no prefill engine is ready", is_makeshift=True)
    assert choose_route([busy, idle]) == alone
    assert choose_route([busy, idle], {idle.incarnation}) == replace(alone, decode=busy)
    assert choose_route([busy, idle, mixed]) == Route(mixed, reason="mixed engine")


def test_a_decode_engine_takes_nothing_off_a_prefill_engine_that_is_there() -> None:
    """One that a request has to avoid may be overloaded."""
    prefill, decode = engine("p0", "prefill"), engine("d0", "decode")
    assert choose_route([prefill, decode], {prefill.incarnation}) == NoRoute("no prefill engine is ready")


def test_weights_with_a_whole_route_go_before_a_decode_engine_alone() -> None:
    old = engine("d0", "decode", fingerprint="1")
    policy = OneModelPolicy(registered(old))
    assert names(policy.choose()) == (None, "d0")
    new = [engine("p1", "prefill", fingerprint="2"), engine("d1", "decode", fingerprint="2")]
    policy = OneModelPolicy(registered(old, *new))
    assert names(policy.choose()) == ("p1", "d1")
    assert names(policy.choose((), "1")) == (None, "d0"), "what it has begun it may end"

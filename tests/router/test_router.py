"""Requests on their routes: two engines make one answer, and another route is taken when one of them fails."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest

from tandem.api.backend import EngineState
from tandem.errors import (
    EngineFailed,
    EngineLeft,
    InvalidRequest,
    KvLost,
    NoTokenLeft,
    Overloaded,
    RequestError,
    TimedOut,
    Unavailable,
)
from tandem.ids import EngineIdentity
from tandem.router.engine_registry import ALIVE_SECONDS, EngineRegistry
from tandem.wire.engine_status import PeerInfo
from tandem.wire.messages import Abort, Generate, Local, Prefill, PullKv
from tests.router.running_router import PROMPT, RunningRouter, ScriptedEngine, assert_one_hand_off, running_router

pytestmark = pytest.mark.anyio


async def test_the_request_goes_to_both_engines_at_once(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    assert_one_hand_off(there, here)
    assert there.token_ids == here.token_ids == PROMPT
    assert there.sampling == here.sampling
    assert isinstance(here.kv, PullKv)
    assert (here.kv.engine_id, here.kv.incarnation) == (prefill.identity.engine_id, prefill.identity.incarnation)
    await answer.leave()


async def test_the_first_token_of_one_and_the_rest_of_the_other_make_one_answer(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    decode.send_tokens(here, 1, 11)
    decode.send_tokens(here, 2, 12, 13, finish="length")
    assert await answer.whole() == [10, 11, 12, 13]
    assert answer.last is not None
    assert answer.last.finish_reason == "length"
    assert answer.details is not None
    assert (answer.details.prefill_engine, answer.details.decode_engine) == ("prefill-0", "decode-0")
    assert (answer.details.disaggregated, answer.details.transport, answer.details.bytes) == (True, "tcp", 64)


async def test_tokens_that_overtake_the_first_one_wait_for_it(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    decode.send_tokens(here, 1, 11)
    decode.send_tokens(here, 2, 12, finish="stop")
    decode.beat()
    prefill.send_tokens(there, 0, 10, done=True)
    assert await answer.whole() == [10, 11, 12]
    assert answer.last is not None
    assert answer.last.finish_reason == "stop"


async def test_tokens_that_come_twice_are_told_once(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    decode.send_tokens(here, 0, 10, 11)  # it had to compute the prompt itself
    decode.send_tokens(here, 2, 12, finish="length")
    assert await answer.whole() == [10, 11, 12]


async def test_an_answer_of_one_token_ends_the_decode_engines_part(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask(max_tokens=1)
    there, here = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, finish="length")
    assert await answer.whole() == [10]
    assert await decode.abort() == Abort(here.request_id)
    assert answer.details.reason == "it ended with the first token"


async def test_a_client_that_leaves_ends_the_request_on_both_engines(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    await answer.leave()
    assert await prefill.abort() == Abort(there.request_id)
    assert await decode.abort() == Abort(here.request_id)
    assert [engine.active for engine in router.registry] == [0, 0]


async def test_when_prefill_fails_the_decode_engine_goes_on_alone(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.fail(there)
    decode.send_tokens(here, 0, 10, 11, finish="length")
    assert await answer.whole() == [10, 11]


async def test_a_prefill_engine_that_is_lost_with_the_first_token_on_its_way_is_replaced(router: RunningRouter) -> None:
    """The decode engine has read that token with the KV, and so does not send it itself."""
    prefill, decode = await router.pair()
    answer = router.ask(max_tokens=3)
    await prefill.request()
    here = await decode.request()
    prefill.leave()
    other = await router.engine("prefill-1", "prefill")
    decode.send_tokens(here, 1, 11, 12, finish="length")
    again_there, again = await other.request(), await decode.request()
    decode.send_tokens(again, 1, 11, 12, finish="length")
    other.send_tokens(again_there, 0, 10, done=True)
    assert await answer.whole() == [10, 11, 12]


async def test_an_answer_is_of_one_model_also_when_engines_with_new_weights_take_over() -> None:
    async with running_router(route_timeout=0.1) as router:
        prefill, decode = await router.pair()
        new = await router.engine("mixed-1", "mixed", fingerprint="new")
        begun, waiting = router.ask(), router.ask()
        requests = [await prefill.request(), await prefill.request()]
        await decode.request()
        prefill.send_tokens(requests[0], 0, 10, done=True)
        assert await begun.until(1) == [10]
        decode.leave()
        request = await new.request()
        assert request.token_ids == PROMPT, "only a request without output may go on with other weights"
        new.send_tokens(request, 0, 20, finish="stop")
        assert await waiting.whole() == [20]
        assert isinstance(await begun.error(), EngineLeft)


async def test_what_was_under_way_when_a_connection_broke_is_asked_for_again(router: RunningRouter) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    answer = router.ask()
    first = await mixed.request()
    mixed.send_tokens(first, 0, 10)
    assert await answer.until(1) == [10]
    await mixed.register(connection=1)
    assert await mixed.abort() == Abort(first.request_id)
    again = await mixed.request()
    assert again.token_ids == [*PROMPT, 10]
    await mixed.register(connection=1)
    mixed.send_tokens(again, 1, 11, finish="stop")
    assert await answer.whole() == [10, 11]


async def test_a_prefill_engine_that_has_done_its_part_is_no_longer_busy(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, done=True)
    await answer.until(1)
    assert {engine.engine_id: engine.active for engine in router.registry} == {"prefill-0": 0, "decode-0": 1}
    decode.send_tokens(here, 1, 11, finish="stop")
    await answer.whole()
    assert {engine.engine_id: engine.active for engine in router.registry} == {"prefill-0": 0, "decode-0": 0}


async def test_when_the_decode_engine_is_lost_another_one_goes_on_from_the_tokens_so_far(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask(max_tokens=5, seed=0)
    there, here = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, done=True)
    decode.send_tokens(here, 1, 11)
    assert await answer.until(2) == [10, 11]
    other = await router.engine("decode-1", "decode")
    decode.leave()
    again_there, again = await prefill.request(), await other.request()
    assert_one_hand_off(again_there, again)
    assert (again.token_ids, again.prompt_len) == ([*PROMPT, 10, 11], len(PROMPT))
    assert again.sampling == here.sampling, "a resumed request draws from the same generator"
    assert again.request_id != here.request_id
    prefill.send_tokens(again_there, 2, 12, done=True)
    other.send_tokens(again, 3, 13, 14, finish="length")
    assert await answer.whole() == [10, 11, 12, 13, 14]
    assert (answer.details.decode_engine, answer.details.recomputations) == ("decode-1", 1)


async def test_late_words_of_a_lost_engine_are_not_heard(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    other = await router.engine("decode-1", "decode")
    answer = router.ask()
    first = await first_to_hear(decode, other)
    there = await prefill.request()
    here = await first.request()
    prefill.send_tokens(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    first.fail(here)
    second = other if first is decode else decode
    again_there, again = await prefill.request(), await second.request()
    first.send_tokens(here, 1, 99, finish="length")
    await first.register()
    prefill.send_tokens(again_there, 1, 11, done=True)
    second.send_tokens(again, 2, 12, finish="length")
    assert await answer.whole() == [10, 11, 12]


async def first_to_hear(*engines: ScriptedEngine) -> ScriptedEngine:
    while True:
        for engine in engines:
            if not engine.heard.empty():
                return engine
        await asyncio.sleep(0)


async def test_an_engine_that_restarts_fails_what_its_earlier_incarnation_had(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, _ = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    for engine in router.registry:
        if engine.engine_id == "decode-0":
            engine.last_heard -= 2 * ALIVE_SECONDS
    reborn = await router.engine("decode-0", "decode")
    again_there, again = await prefill.request(), await reborn.request()
    assert again.token_ids == [*PROMPT, 10]
    prefill.send_tokens(again_there, 1, 11, done=True)
    reborn.send_tokens(again, 2, 12, finish="length")
    assert await answer.whole() == [10, 11, 12]
    assert [engine.incarnation for engine in router.registry if engine.engine_id == "decode-0"] == [
        reborn.identity.incarnation
    ]


async def test_when_no_other_engine_is_left_the_failure_is_told(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    await prefill.request()
    decode.fail(await decode.request(), text="out of luck")
    error = await answer.error()
    assert isinstance(error, EngineFailed)
    assert "out of luck" in str(error)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_request", InvalidRequest),
        ("no_token_left", NoTokenLeft),
        ("internal_error", RequestError),
        ("kv_lost", KvLost),
        ("timed_out", TimedOut),
    ],
)
async def test_what_no_other_engine_can_mend_is_told_at_once(
    router: RunningRouter, code: str, kind: type[RequestError]
) -> None:
    prefill, decode = await router.pair()
    other = await router.engine("prefill-1", "prefill")
    answer = router.ask()
    first = await first_to_hear(prefill, other)
    first.fail(await first.request(), code)
    error = await answer.error()
    assert type(error) is kind
    assert error.retry_after is None
    here = await decode.request()
    assert await decode.abort() == Abort(here.request_id)


async def test_what_one_engine_has_no_room_for_goes_to_another_one(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    other = await router.engine("prefill-1", "prefill")
    answer = router.ask()
    first = await first_to_hear(prefill, other)
    first.fail(await first.request(), "overloaded")
    await decode.request()
    await decode.abort()
    second = other if first is prefill else prefill
    there, here = await second.request(), await decode.request()
    second.send_tokens(there, 0, 10, done=True)
    decode.send_tokens(here, 1, 11, finish="length")
    assert await answer.whole() == [10, 11]


async def test_a_request_that_meets_an_engine_about_to_end_waits_for_the_one_after_it(router: RunningRouter) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    answer = router.ask()
    for number in range(1, 5):  # more often than a request that fails is tried
        mixed.fail(await mixed.request(), "draining")
        mixed.leave()
        mixed = await router.engine(f"mixed-{number}", "mixed")
    mixed.send_tokens(await mixed.request(), 0, 10, finish="stop")
    assert await answer.whole() == [10]


async def test_when_nobody_has_room_the_client_is_told_when_to_come_back(router: RunningRouter) -> None:
    prefill, _ = await router.pair()
    answer = router.ask()
    prefill.fail(await prefill.request(), "overloaded")
    error = await answer.error()
    assert isinstance(error, Overloaded)
    assert error.retry_after == 3


async def test_two_living_engines_of_one_name_do_not_replace_each_other(router: RunningRouter) -> None:
    _, decode = await router.pair()
    message = next(engine.register for engine in router.registry if engine.engine_id == "decode-0")
    twin = msgspec.structs.replace(message, identity=EngineIdentity("decode-0", "another-incarnation"))
    now = time.monotonic()
    assert router.registry.living_namesake(twin, now) is not None
    assert router.registry.living_namesake(message, now) is None
    assert router.registry.living_namesake(twin, now + 2 * ALIVE_SECONDS) is None
    assert decode.identity.incarnation in {engine.incarnation for engine in router.registry}


async def test_without_engines_it_says_which_are_missing(router: RunningRouter) -> None:
    error = await router.ask().error()
    assert isinstance(error, Unavailable)
    assert "no prefill and no decode engine is ready" in str(error)
    await router.engine("prefill-0", "prefill")
    assert not router.backend.health().ok
    assert "no decode engine is ready" in router.backend.health().detail
    await router.engine("decode-0", "decode")
    assert router.backend.health().ok


async def test_a_pair_that_refused_each_other_is_not_made(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    other = await router.engine("prefill-1", "prefill")
    refusal = PeerInfo(prefill.identity.engine_id, prefill.identity.incarnation, "refused", "dtype differs")
    decode.beat(peers=[refusal])
    await router.until(lambda: router.entry("decode-0").peers)  # type: ignore[union-attr]
    for _ in range(3):
        answer = router.ask()
        assert_one_hand_off(await other.request(), await decode.request())
        await answer.leave()
        await other.abort()
        await decode.abort()
    other.leave()
    await router.until(lambda: router.entry("prefill-1") is None)
    assert "decode-0 cannot read from prefill-0: dtype differs" in str(await router.ask().error())


async def test_a_mixed_engine_answers_alone(router: RunningRouter) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    answer = router.ask()
    request = await mixed.request()
    assert isinstance(request.kv, Local)
    mixed.send_tokens(request, 0, 10, 11, finish="stop")
    assert await answer.whole() == [10, 11]
    assert (answer.details.disaggregated, answer.details.reason) == (False, "mixed engine")


async def test_requests_spread_over_engines_of_a_role(router: RunningRouter) -> None:
    await router.engine("prefill-0", "prefill")
    decodes = [await router.engine(f"decode-{i}", "decode") for i in range(3)]
    answers = [router.ask() for _ in range(6)]
    for decode in decodes:
        for _ in range(2):
            assert isinstance((await decode.request()).kv, PullKv)
    for answer in answers:
        await answer.leave()


async def test_prefill_engines_are_introduced_to_decode_engines(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    await router.engine("prefill-1", "prefill")
    for _ in range(200):
        if len(decode.introduced) == 2:
            break
        await decode.register()
    assert prefill.identity.incarnation in decode.introduced
    assert len(decode.introduced) == 2
    assert prefill.introduced == []


async def test_an_engine_that_is_not_known_is_told_to_register(router: RunningRouter) -> None:
    stranger = router.stranger("another", "decode")
    stranger.beat()
    await asyncio.wait_for(stranger.not_known.wait(), 20)
    assert router.entry("decode-0") is None


async def test_a_message_that_is_none_is_dropped_and_the_hub_lives(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    decode.send_raw(b"\xc1 what is this")
    decode.send_raw(b"")
    await decode.register()
    assert router.connections.dropped.count == 2
    answer = router.ask()
    prefill.send_tokens(await prefill.request(), 0, 10, finish="stop")
    assert await answer.whole() == [10]


async def test_words_about_requests_nobody_asked_are_dropped(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    ghost = Generate("ghost", [1], 1, (await _one(router, prefill, decode)).sampling, 1.0, Prefill())
    decode.send_tokens(ghost, 0, 1, finish="stop")
    decode.fail(ghost)
    await decode.register()
    assert router.connections.dropped.count == 0


async def _one(router: RunningRouter, prefill: ScriptedEngine, decode: ScriptedEngine) -> Generate:
    answer = router.ask()
    request = await prefill.request()
    await decode.request()
    await answer.leave()
    return request


async def test_an_engine_that_falls_silent_is_given_up_and_the_request_moves_on() -> None:
    async with running_router(EngineRegistry(patience=1.0)) as router:
        prefill, decode = await router.pair()
        answer = router.ask()
        there, _ = await prefill.request(), await decode.request()
        prefill.send_tokens(there, 0, 10, done=True)
        assert await answer.until(1) == [10]
        other = await router.engine("decode-1", "decode")
        beating = asyncio.create_task(_beat(prefill, other))
        again_there, again = await prefill.request(), await other.request()
        prefill.send_tokens(again_there, 1, 11, done=True)
        other.send_tokens(again, 2, 12, finish="length")
        assert await answer.whole() == [10, 11, 12]
        beating.cancel()


async def _beat(*engines: ScriptedEngine) -> None:
    while True:
        for engine in engines:
            engine.beat()
        await asyncio.sleep(0.1)


async def test_a_request_that_no_engine_ends_is_ended_by_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.router.attempt.GRACE_SECONDS", 0.1)
    async with running_router(timeout=0.1) as router:
        prefill, decode = await router.pair()
        answer = router.ask()
        here = await decode.request()
        assert here.time_left <= 0.1
        assert isinstance(await answer.error(), TimedOut)
        assert await decode.abort() == Abort(here.request_id)
        assert isinstance((await prefill.request()).kv, Prefill)


async def test_nobody_registers_under_the_incarnation_of_another_engine(router: RunningRouter) -> None:
    _, decode = await router.pair()
    stranger = router.stranger("another", "decode")
    known = next(engine.register for engine in router.registry if engine.engine_id == "decode-0")
    stranger.send(known)
    await stranger.register()  # once it is answered, what came before it was looked at
    assert router.connections.dropped.count == 1
    [entry] = [engine for engine in router.registry if engine.incarnation == decode.identity.incarnation]
    assert entry.sender == decode.identity.incarnation.encode()


async def test_an_engine_that_drains_is_not_chosen_and_its_requests_end(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    decode.beat(draining=True)
    await router.until(lambda: router.backend.engines()[1].state is EngineState.DRAINING)
    assert "no decode engine is ready" in router.backend.health().detail
    prefill.send_tokens(there, 0, 10, done=True)
    decode.send_tokens(here, 1, 11, finish="length")
    assert await answer.whole() == [10, 11]

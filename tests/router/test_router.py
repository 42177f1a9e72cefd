"""A request on its path: two engines make one answer, and what becomes of it when one of them fails."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import wraps

import msgspec
import pytest

from tandem.errors import EngineFailed, EngineLost, InvalidRequest, Overloaded, TimedOut, Unavailable
from tandem.ids import EngineIdentity
from tandem.router.registry import RIVAL_SECONDS, EngineRegistry
from tandem.wire.messages import Abort, Generate, Local, PeerInfo, Prefill, PullKv
from tests.router.scene import PROMPT, FakeEngine, Scene, scene, split


def runs(test: Callable[[Scene], Coroutine[None, None, None]]) -> Callable[[], None]:
    """A test as a coroutine on a scene of its own."""

    @wraps(test)
    def run() -> None:
        async def play() -> None:
            async with scene() as made:
                await test(made)

        asyncio.run(play())

    del run.__wrapped__  # or pytest would look for a fixture of the test's argument
    return run


@runs
async def test_the_request_goes_to_both_engines_at_once(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    there, here = await prefill.request(), await decode.request()
    split(there, here)
    assert there.token_ids == here.token_ids == PROMPT
    assert there.sampling == here.sampling
    assert isinstance(here.kv, PullKv)
    assert (here.kv.engine_id, here.kv.incarnation) == (prefill.identity.engine_id, prefill.identity.incarnation)
    await answer.leave()


@runs
async def test_the_first_token_of_one_and_the_rest_of_the_other_make_one_answer(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.say(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    decode.say(here, 1, 11)
    decode.say(here, 2, 12, 13, finish="length")
    assert await answer.whole() == [10, 11, 12, 13]
    assert answer.last is not None
    assert answer.last.finish_reason == "length"
    assert answer.last.how is not None
    assert (answer.last.how.prefill_engine, answer.last.how.decode_engine) == ("prefill-0", "decode-0")
    assert (answer.last.how.disaggregated, answer.last.how.transport, answer.last.how.bytes) == (True, "tcp", 64)


@runs
async def test_tokens_that_overtake_the_first_one_wait_for_it(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    there, here = await prefill.request(), await decode.request()
    decode.say(here, 1, 11)
    decode.say(here, 2, 12, finish="stop")
    decode.beat()
    prefill.say(there, 0, 10, done=True)
    assert await answer.whole() == [10, 11, 12]
    assert answer.last is not None
    assert answer.last.finish_reason == "stop"


@runs
async def test_tokens_that_come_twice_are_told_once(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.say(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    decode.say(here, 0, 10, 11)  # it had to compute the prompt itself
    decode.say(here, 1, 11, 12, finish="length")
    assert await answer.whole() == [10, 11, 12]


@runs
async def test_an_answer_of_one_token_ends_the_decode_engines_part(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask(max_tokens=1)
    there, here = await prefill.request(), await decode.request()
    prefill.say(there, 0, 10, finish="length")
    assert await answer.whole() == [10]
    assert await decode.next(Abort) == Abort(here.request_id)
    assert answer.last is not None
    assert answer.last.how is not None
    assert answer.last.how.reason == "it ended with the first token"


@runs
async def test_a_client_that_leaves_ends_the_request_on_both_engines(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    there, here = await prefill.request(), await decode.request()
    await answer.leave()
    assert await prefill.next(Abort) == Abort(there.request_id)
    assert await decode.next(Abort) == Abort(here.request_id)
    assert [member.active for member in stage.pool] == [0, 0]


@runs
async def test_when_prefill_fails_the_decode_engine_goes_on_alone(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.fail(there)
    decode.say(here, 0, 10, 11, finish="length")
    assert await answer.whole() == [10, 11]


@runs
async def test_a_prefill_engine_that_is_lost_with_the_first_token_on_its_way_is_replaced(stage: Scene) -> None:
    """The decode engine has read that token with the KV, and so does not send it itself."""
    prefill, decode = await stage.pair()
    answer = stage.ask(max_tokens=3)
    await prefill.request()
    here = await decode.request()
    prefill.leave()
    other = await stage.engine("prefill-1", "prefill")
    decode.say(here, 1, 11, 12, finish="length")
    again_there, again = await other.request(), await next_request(decode)
    decode.say(again, 1, 11, 12, finish="length")
    other.say(again_there, 0, 10, done=True)
    assert await answer.whole() == [10, 11, 12]


async def next_request(engine: FakeEngine) -> Generate:
    """What comes after the end of what it had."""
    while not isinstance(message := await engine.heard.get(), Generate):
        pass
    return message


@runs
async def test_an_answer_is_of_one_model_also_when_engines_with_new_weights_take_over(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    new = await stage.engine("mixed-1", "mixed", fingerprint="new")
    begun, waiting = stage.ask(), stage.ask()
    requests = [await prefill.request(), await prefill.request()]
    await decode.request()
    prefill.say(requests[0], 0, 10, done=True)
    assert await begun.until(1) == [10]
    decode.leave()
    request = await new.request()
    assert request.token_ids == PROMPT, "only a request without output may go on with other weights"
    new.say(request, 0, 20, finish="stop")
    assert await waiting.whole() == [20]
    assert isinstance(await begun.error(), EngineLost)


@runs
async def test_what_was_under_way_when_a_connection_broke_is_asked_for_again(stage: Scene) -> None:
    mixed = await stage.engine("mixed-0", "mixed")
    answer = stage.ask()
    first = await mixed.request()
    mixed.say(first, 0, 10)
    assert await answer.until(1) == [10]
    await mixed.register(connection=1)
    assert await mixed.next(Abort) == Abort(first.request_id)
    again = await mixed.request()
    assert again.token_ids == [*PROMPT, 10]
    await mixed.register(connection=1)
    mixed.say(again, 1, 11, finish="stop")
    assert await answer.whole() == [10, 11]


@runs
async def test_a_prefill_engine_that_has_done_its_part_is_no_longer_busy(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.say(there, 0, 10, done=True)
    await answer.until(1)
    assert {member.engine_id: member.active for member in stage.pool} == {"prefill-0": 0, "decode-0": 1}
    decode.say(here, 1, 11, finish="stop")
    await answer.whole()
    assert {member.engine_id: member.active for member in stage.pool} == {"prefill-0": 0, "decode-0": 0}


@runs
async def test_when_the_decode_engine_is_lost_another_one_goes_on_from_the_tokens_so_far(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask(max_tokens=5, seed=0)
    there, here = await prefill.request(), await decode.request()
    prefill.say(there, 0, 10, done=True)
    decode.say(here, 1, 11)
    assert await answer.until(2) == [10, 11]
    other = await stage.engine("decode-1", "decode")
    decode.leave()
    again_there, again = await prefill.request(), await other.request()
    split(again_there, again)
    assert (again.token_ids, again.prompt_len) == ([*PROMPT, 10, 11], len(PROMPT))
    assert again.sampling == here.sampling, "a resumed request draws from the same generator"
    assert again.request_id != here.request_id
    prefill.say(again_there, 2, 12, done=True)
    other.say(again, 3, 13, 14, finish="length")
    assert await answer.whole() == [10, 11, 12, 13, 14]
    assert answer.last is not None
    assert answer.last.how is not None
    assert (answer.last.how.decode_engine, answer.last.how.recomputations) == ("decode-1", 1)


@runs
async def test_late_words_of_a_lost_engine_are_not_heard(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    other = await stage.engine("decode-1", "decode")
    answer = stage.ask()
    first = await first_to_hear(decode, other)
    there = await prefill.request()
    here = await first.request()
    prefill.say(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    first.fail(here)
    second = other if first is decode else decode
    again_there, again = await prefill.request(), await second.request()
    first.say(here, 1, 99, finish="length")
    await first.register()
    prefill.say(again_there, 1, 11, done=True)
    second.say(again, 2, 12, finish="length")
    assert await answer.whole() == [10, 11, 12]


async def first_to_hear(*engines: FakeEngine) -> FakeEngine:
    while True:
        for engine in engines:
            if not engine.heard.empty():
                return engine
        await asyncio.sleep(0)


@runs
async def test_an_engine_that_restarts_fails_what_its_earlier_life_had(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    there, _ = await prefill.request(), await decode.request()
    prefill.say(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    for member in stage.pool:
        if member.engine_id == "decode-0":
            member.last_heard -= 2 * RIVAL_SECONDS
    reborn = await stage.engine("decode-0", "decode")
    again_there, again = await prefill.request(), await reborn.request()
    assert again.token_ids == [*PROMPT, 10]
    prefill.say(again_there, 1, 11, done=True)
    reborn.say(again, 2, 12, finish="length")
    assert await answer.whole() == [10, 11, 12]
    assert [member.incarnation for member in stage.pool if member.engine_id == "decode-0"] == [
        reborn.identity.incarnation
    ]


@runs
async def test_when_no_other_engine_is_left_the_failure_is_told(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    answer = stage.ask()
    await prefill.request()
    decode.fail(await decode.request(), text="out of luck")
    error = await answer.error()
    assert isinstance(error, EngineFailed)
    assert "out of luck" in str(error)


@pytest.mark.parametrize(("code", "kind"), [("invalid_request", InvalidRequest), ("timed_out", TimedOut)])
def test_what_no_other_engine_can_mend_is_told_at_once(code: str, kind: type[Exception]) -> None:
    @runs
    async def play(stage: Scene) -> None:
        prefill, decode = await stage.pair()
        other = await stage.engine("prefill-1", "prefill")
        answer = stage.ask()
        first = await first_to_hear(prefill, other)
        first.fail(await first.request(), code)
        error = await answer.error()
        assert isinstance(error, kind)
        assert error.retry_after is None
        here = await decode.request()
        assert await decode.next(Abort) == Abort(here.request_id)

    play()


@runs
async def test_what_one_engine_has_no_room_for_goes_to_another_one(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    other = await stage.engine("prefill-1", "prefill")
    answer = stage.ask()
    first = await first_to_hear(prefill, other)
    first.fail(await first.request(), "overloaded")
    await decode.request()
    await decode.next(Abort)
    second = other if first is prefill else prefill
    there, here = await second.request(), await decode.request()
    second.say(there, 0, 10, done=True)
    decode.say(here, 1, 11, finish="length")
    assert await answer.whole() == [10, 11]


@runs
async def test_when_nobody_has_room_the_client_is_told_when_to_come_back(stage: Scene) -> None:
    prefill, _ = await stage.pair()
    answer = stage.ask()
    prefill.fail(await prefill.request(), "overloaded")
    error = await answer.error()
    assert isinstance(error, Overloaded)
    assert error.retry_after == 3


@runs
async def test_two_living_engines_of_one_name_do_not_replace_each_other(stage: Scene) -> None:
    _, decode = await stage.pair()
    message = next(member.register for member in stage.pool if member.engine_id == "decode-0")
    twin = msgspec.structs.replace(message, identity=EngineIdentity("decode-0", "another-life"))
    now = time.monotonic()
    assert stage.pool.rival(twin, now) is not None
    assert stage.pool.rival(message, now) is None
    assert stage.pool.rival(twin, now + 2 * RIVAL_SECONDS) is None
    assert decode.identity.incarnation in {member.incarnation for member in stage.pool}


@runs
async def test_without_engines_it_says_which_are_missing(stage: Scene) -> None:
    error = await stage.ask().error()
    assert isinstance(error, Unavailable)
    assert "no prefill and no decode engine is ready" in str(error)
    await stage.engine("prefill-0", "prefill")
    assert not stage.router.health().ok
    assert "no decode engine is ready" in stage.router.health().detail
    await stage.engine("decode-0", "decode")
    assert stage.router.health().ok


@runs
async def test_a_pair_that_refused_each_other_is_not_made(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    other = await stage.engine("prefill-1", "prefill")
    refusal = PeerInfo(prefill.identity.engine_id, prefill.identity.incarnation, "refused", "dtype differs")
    decode.beat(peers=[refusal])
    await stage.until(lambda: stage.pool.find("decode-0").peers)  # type: ignore[union-attr]
    for _ in range(3):
        answer = stage.ask()
        split(await other.request(), await decode.request())
        await answer.leave()
        await other.next(Abort)
        await decode.next(Abort)
    other.leave()
    await stage.until(lambda: stage.pool.find("prefill-1") is None)
    assert "decode-0 cannot read from prefill-0: dtype differs" in str(await stage.ask().error())


@runs
async def test_a_mixed_engine_answers_alone(stage: Scene) -> None:
    mixed = await stage.engine("mixed-0", "mixed")
    answer = stage.ask()
    request = await mixed.request()
    assert isinstance(request.kv, Local)
    mixed.say(request, 0, 10, 11, finish="stop")
    assert await answer.whole() == [10, 11]
    assert answer.last is not None
    assert answer.last.how is not None
    assert (answer.last.how.disaggregated, answer.last.how.reason) == (False, "mixed engine")


@runs
async def test_requests_spread_over_engines_of_a_role(stage: Scene) -> None:
    await stage.engine("prefill-0", "prefill")
    decodes = [await stage.engine(f"decode-{i}", "decode") for i in range(3)]
    answers = [stage.ask() for _ in range(6)]
    for decode in decodes:
        for _ in range(2):
            assert isinstance((await decode.request()).kv, PullKv)
    for answer in answers:
        await answer.leave()


@runs
async def test_prefill_engines_are_introduced_to_decode_engines(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    await stage.engine("prefill-1", "prefill")
    for _ in range(200):
        if len(decode.introduced) == 2:
            break
        await decode.register()
    assert prefill.identity.incarnation in decode.introduced
    assert len(decode.introduced) == 2
    assert prefill.introduced == []


@runs
async def test_an_engine_that_is_not_known_is_told_to_register(stage: Scene) -> None:
    stranger = stage.stranger("decode-0", "decode")
    stranger.beat()
    await asyncio.wait_for(stranger.not_known.wait(), 20)
    assert stage.pool.find("decode-0") is None


@runs
async def test_a_message_that_is_none_is_dropped_and_the_hub_lives(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    decode.send_raw(b"\xc1 what is this")
    decode.send_raw(b"")
    await decode.register()
    assert stage.hub.bad_messages == 2
    answer = stage.ask()
    prefill.say(await prefill.request(), 0, 10, finish="stop")
    assert await answer.whole() == [10]


@runs
async def test_words_about_requests_nobody_asked_are_dropped(stage: Scene) -> None:
    prefill, decode = await stage.pair()
    ghost = Generate("ghost", [1], 1, (await _one(stage, prefill, decode)).sampling, 1.0, Prefill())
    decode.say(ghost, 0, 1, finish="stop")
    decode.fail(ghost)
    await decode.register()
    assert stage.hub.bad_messages == 0


async def _one(stage: Scene, prefill: FakeEngine, decode: FakeEngine) -> Generate:
    answer = stage.ask()
    request = await prefill.request()
    await decode.request()
    await answer.leave()
    return request


def test_an_engine_that_falls_silent_is_given_up_and_the_request_moves_on() -> None:
    async def play() -> None:
        async with scene(EngineRegistry(patience=1.0)) as stage:
            prefill, decode = await stage.pair()
            answer = stage.ask()
            there, _ = await prefill.request(), await decode.request()
            prefill.say(there, 0, 10, done=True)
            assert await answer.until(1) == [10]
            other = await stage.engine("decode-1", "decode")
            beating = asyncio.create_task(_beat(prefill, other))
            again_there, again = await prefill.request(), await other.request()
            prefill.say(again_there, 1, 11, done=True)
            other.say(again, 2, 12, finish="length")
            assert await answer.whole() == [10, 11, 12]
            beating.cancel()

    asyncio.run(play())


async def _beat(*engines: FakeEngine) -> None:
    while True:
        for engine in engines:
            engine.beat()
        await asyncio.sleep(0.1)


def test_a_request_that_no_engine_ends_is_ended_by_the_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.router.router.GRACE", 0.1)

    async def play() -> None:
        async with scene(timeout=0.1) as stage:
            prefill, decode = await stage.pair()
            answer = stage.ask()
            here = await decode.request()
            assert here.time_left <= 0.1
            error = await answer.error()
            assert isinstance(error, TimedOut)
            assert await decode.next(Abort) == Abort(here.request_id)
            assert isinstance((await prefill.request()).kv, Prefill)

    asyncio.run(play())

"""Engines that die, hang, leave, disagree or lie: each request ends right or with an error, and no other notices."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tandem.api.backend import EngineState, Health
from tandem.errors import EngineFailed, EngineLost, Unavailable
from tandem.ids import EngineIdentity
from tandem.router.engine_registry import MAX_ENGINES, EngineRegistry
from tandem.wire.messages import Abort, Local, TokenLogprobs
from tests.router.running_router import PROMPT, RunningRouter, ScriptedEngine, assert_one_hand_off, running_router
from tests.support.registrations import STEP_TIMEOUT, VOCABULARY, make_register

pytestmark = pytest.mark.anyio

FOR_EVER = 1e6


@pytest.fixture
async def router(anyio_backend: str) -> AsyncIterator[RunningRouter]:
    """A router that never takes silence for a loss."""
    async with running_router(EngineRegistry(patience=FOR_EVER)) as running:
        yield running


# --- one author for each token -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)], ids=["first", "between", "last"])
async def test_two_texts_are_never_mixed_whatever_comes_first(order: tuple[int, ...], router: RunningRouter) -> None:
    """The prefill engine sends its first token; the decode engine lost the KV and makes another text."""
    prefill, decode = await router.pair()
    answer = router.ask(max_tokens=4)
    there, here = await prefill.request(), await decode.request()
    sends = [
        lambda: prefill.send_tokens(there, 0, 10, done=True),
        lambda: decode.send_tokens(here, 0, 20),
        lambda: decode.send_tokens(here, 1, 21, after=[20]),
    ]
    for place in order:
        sends[place]()
        await (prefill if place == 0 else decode).register()  # answered once all before it has been read
    again_there, again = await prefill.request(), await decode.request()
    output = again.token_ids[len(PROMPT) :]
    assert output in ([10], [20], [20, 21])
    assert again_there.token_ids == again.token_ids, "it goes on from what the client has"
    left = list(range(30, 34 - len(output)))
    prefill.send_tokens(again_there, len(output), left[0], after=output, done=True)
    decode.send_tokens(again, len(output) + 1, *left[1:], after=[*output, left[0]], finish="length")
    assert await answer.whole() == output + left


LOGPROB = TokenLogprobs(-0.5, [])


@pytest.mark.parametrize("copy_comes", ["first", "last"])
async def test_a_first_token_that_is_the_last_comes_with_its_log_probability(
    copy_comes: str, router: RunningRouter
) -> None:
    """The decode engine had it with the KV, and does not know how likely it was."""
    prefill, decode = await router.pair()
    answer = router.ask(max_tokens=1, logprobs=0)
    there, here = await prefill.request(), await decode.request()

    async def copy() -> None:
        decode.send_tokens(here, 0, 10, finish="length")
        await decode.register()  # answered once all before it has been read

    if copy_comes == "first":
        await copy()
    prefill.send_tokens(there, 0, 10, finish="length", logprobs=[LOGPROB])
    if copy_comes == "last":
        await copy()
    assert await answer.whole() == [10]
    assert answer.last is not None
    assert answer.last.logprobs == [LOGPROB]


@pytest.mark.parametrize("lost", ["before", "after"])
async def test_a_first_token_whose_engine_is_lost_is_made_again_if_nobody_knows_how_likely_it_was(
    lost: str, router: RunningRouter
) -> None:
    prefill, decode = await router.pair()
    other = await router.engine("prefill-1", "prefill")
    answer = router.ask(max_tokens=1, logprobs=0)
    here = await decode.request()
    first, second = (prefill, other) if not prefill.heard.empty() else (other, prefill)
    if lost == "before":
        first.leave(failed=True)
        await router.until(lambda: router.entry(first.identity.engine_id) is None)
    decode.send_tokens(here, 0, 10, finish="length")
    await decode.register()
    if lost == "after":
        first.leave(failed=True)
    there = await second.request()
    second.send_tokens(there, 0, 10, finish="length", logprobs=[LOGPROB])
    assert await answer.whole() == [10]


# --- engines that are lost ---------------------------------------------------------------------------------------


async def test_an_engine_whose_connection_breaks_is_replaced_at_once(router: RunningRouter) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    answer = router.ask(max_tokens=2)
    mixed.send_tokens(await mixed.request(), 0, 10)
    assert await answer.until(1) == [10]
    other = await router.engine("mixed-1", "mixed")
    await mixed.close()
    again = await other.request()
    assert again.token_ids == [*PROMPT, 10]
    other.send_tokens(again, 1, 11, finish="length")
    assert await answer.whole() == [10, 11]
    entry = router.entry("mixed-0")
    assert entry is not None
    assert (entry.state, entry.reason) == (EngineState.LOST, "its connection broke")


async def test_what_an_engine_that_leaves_has_said_last_is_heard_before_its_end(router: RunningRouter) -> None:
    """The end of its connection comes another way, and sooner when the router is busy."""
    mixed, other = await router.engine("mixed-0", "mixed"), await router.engine("mixed-1", "mixed", draining=True)
    answer = router.ask(max_tokens=300)
    request = await mixed.request()
    for index in range(300):  # more than are received at one go
        mixed.send_tokens(request, index, 10 + index, finish="length" if index == 299 else None)
    mixed.leave()
    await mixed.end()
    router.miss_the_end_of_a_connection()
    other.beat()
    assert await answer.whole() == list(range(10, 310))
    assert answer.details.recomputations == 0
    assert other.heard.empty()


async def test_after_a_break_an_engine_is_not_used_until_it_registers_again(router: RunningRouter) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    mixed.break_connection()
    await router.until(lambda: not router.backend.health().ok)
    mixed.beat()
    await asyncio.wait_for(mixed.not_known.wait(), 20)
    assert not router.backend.health().ok
    await mixed.register(connection=1)
    assert router.backend.health().ok


async def test_the_end_of_a_connection_that_was_replaced_says_nothing(router: RunningRouter) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    for connection in range(1, 6):
        mixed.break_connection()
        await mixed.register(connection=connection)
        answer = router.ask(max_tokens=1)
        mixed.send_tokens(await mixed.request(), 0, 10, finish="length")
        assert await answer.whole() == [10]


async def test_a_request_that_engines_die_of_kills_two_and_no_more(router: RunningRouter) -> None:
    engines = [await router.engine(f"mixed-{i}", "mixed") for i in range(4)]
    died: list[str] = []

    async def die(engine: ScriptedEngine) -> None:
        await engine.request()
        died.append(engine.identity.engine_id)
        await engine.close()

    answer = router.ask()
    dying = [asyncio.create_task(die(engine)) for engine in engines]
    error = await answer.error()
    assert type(error) is EngineFailed
    assert "engines were lost in 2 attempts at this request" in str(error)
    assert len(died) == 2
    for task in dying:
        task.cancel()


async def test_a_rolling_restart_of_any_number_of_engines_fails_no_request(router: RunningRouter) -> None:
    await router.engine("mixed-0", "mixed")
    answer = router.ask(max_tokens=20)
    for number in range(6):
        engine = router.engines[-1]
        request = await engine.request()
        assert request.token_ids == [*PROMPT, *range(10, 10 + number)]
        engine.send_tokens(request, number, 10 + number)
        assert len(await answer.until(number + 1)) == number + 1
        await router.engine(f"mixed-{number + 1}", "mixed")
        engine.leave()
    last = router.engines[-1]
    last.send_tokens(await last.request(), 6, 16, finish="stop")
    assert await answer.whole() == list(range(10, 17))


# --- waiting for a route -----------------------------------------------------------------------------------------


async def test_requests_old_and_new_wait_for_engines_that_come_back(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    begun = router.ask(max_tokens=2)
    there, _ = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, done=True)
    assert await begun.until(1) == [10]
    await decode.close()
    await router.until(lambda: not router.backend.health().ok)
    new = router.ask(max_tokens=1)
    reborn = await router.engine("decode-0", "decode")
    for _ in range(2):
        there, _ = await prefill.request(), await reborn.request()
        done = len(there.token_ids) - len(PROMPT)
        prefill.send_tokens(there, done, 10 + done, finish="length")
    assert (await begun.whole(), await new.whole()) == ([10, 11], [10])


async def test_a_request_does_not_wait_longer_than_the_route_timeout() -> None:
    async with running_router(EngineRegistry(patience=FOR_EVER), route_timeout=0.1) as router:
        mixed = await router.engine("mixed-0", "mixed")
        begun = router.ask()
        await mixed.request()
        await mixed.close()
        assert isinstance(await begun.error(), EngineLost)
        error = await router.ask().error()
        assert isinstance(error, Unavailable)
        assert error.retry_after is not None


async def test_a_request_does_not_wait_beyond_its_own_deadline() -> None:
    async with running_router(EngineRegistry(patience=FOR_EVER), timeout=0.1, route_timeout=FOR_EVER) as router:
        mixed = await router.engine("mixed-0", "mixed")
        assert router.backend.health().ok
        mixed.leave()
        await router.until(lambda: router.entry("mixed-0") is None)
        assert isinstance(await router.ask().error(), Unavailable)


# --- no prefill engine -------------------------------------------------------------------------------------------


async def test_when_the_last_prefill_engine_is_gone_the_decode_engine_serves_alone_and_says_why(
    router: RunningRouter,
) -> None:
    prefill, decode = await router.pair()
    assert router.backend.health() == Health(True, "ready")
    begun = router.ask(max_tokens=2)
    await prefill.request()
    here = await decode.request()
    prefill.leave()
    await router.until(lambda: router.entry("prefill-0") is None)
    health = Health(True, "no prefill engine is ready: decode engines serve alone", whole=False)
    assert router.backend.health() == health
    answer = router.ask(max_tokens=2)
    request = await decode.request()
    assert isinstance(request.kv, Local)
    decode.send_tokens(request, 0, 10, 11, finish="length", done=True)
    assert await answer.whole() == [10, 11]
    assert (answer.details.prefill_engine, answer.details.decode_engine) == ("decode-0", "decode-0")
    assert (answer.details.disaggregated, answer.details.reason) == (False, "no prefill engine is ready")
    decode.send_tokens(here, 0, 10, 11, finish="length")
    assert await begun.whole() == [10, 11]
    other = await router.engine("prefill-1", "prefill")
    assert router.backend.health() == Health(True, "ready")
    again = router.ask()
    assert_one_hand_off(await other.request(), await decode.request())
    await again.leave()


@pytest.mark.parametrize("change", [{"draining": True}, {"step_seconds": STEP_TIMEOUT}], ids=["drains", "hangs"])
async def test_a_prefill_engine_that_takes_nothing_is_none(change: dict[str, Any], router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    prefill.beat(**change)
    await router.until(lambda: not router.backend.health().whole)
    answer = router.ask()
    assert isinstance((await decode.request()).kv, Local)
    await answer.leave()


# --- engines that hang -------------------------------------------------------------------------------------------

BELOW, BEYOND = STEP_TIMEOUT / 4, STEP_TIMEOUT / 4 + 0.1


async def test_an_engine_whose_step_hangs_is_not_used_and_its_requests_go_elsewhere(router: RunningRouter) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    answer = router.ask(max_tokens=2)
    mixed.send_tokens(await mixed.request(), 0, 10)
    assert await answer.until(1) == [10]
    mixed.beat(step_seconds=BEYOND)
    await router.until(lambda: not router.backend.health().ok)
    entry = router.entry("mixed-0")
    assert entry is not None
    assert entry.state is EngineState.STALLED
    assert entry.reason == "a step of it has run for 5.1 s, longer than 5 s"
    other = await router.engine("mixed-1", "mixed")
    again = await other.request()
    assert again.token_ids == [*PROMPT, 10]
    assert isinstance(await mixed.abort(), Abort)
    other.send_tokens(again, 1, 11, finish="length")
    assert await answer.whole() == [10, 11]


async def test_where_there_is_no_other_engine_a_step_that_ends_after_all_is_good(router: RunningRouter) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    answer = router.ask(max_tokens=1)
    request = await mixed.request()
    mixed.beat(step_seconds=BEYOND)
    await router.until(lambda: not router.backend.health().ok)
    mixed.beat(step_seconds=BELOW)
    await router.until(lambda: router.backend.health().ok)
    mixed.send_tokens(request, 0, 10, finish="length")
    assert await answer.whole() == [10]


# --- engines that lie --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lie",
    [
        {"token_ids": [-1]},
        {"token_ids": [VOCABULARY]},
        {"token_ids": [1] * 100_000},
        {"index": 7},
        {"logprobs": []},
        {"finish_reason": "banana", "done": True},
        {"done": True},
    ],
    ids=str,
)
async def test_what_no_engine_may_send_is_a_failed_attempt(lie: dict[str, Any], router: RunningRouter) -> None:
    liar = await router.engine("mixed-0", "mixed")
    answer = router.ask(max_tokens=2)
    request = await liar.request()
    other = await router.engine("mixed-1", "mixed")
    liar.send_tokens(request, 0, 66, **lie)
    liar.send_tokens(request, 0, 10, 66, finish="length")
    again = await other.request()
    assert again.token_ids == PROMPT
    assert await liar.abort() == Abort(request.request_id)
    other.send_tokens(again, 0, 10, 11, finish="length")
    assert await answer.whole() == [10, 11]
    assert router.connections.dropped.count == 0


# --- cancellation ------------------------------------------------------------------------------------------------


async def test_a_client_that_leaves_between_prefill_and_decode_frees_the_prefill_engine_too(
    router: RunningRouter,
) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, done=True)
    assert await answer.until(1) == [10]
    await answer.leave()
    assert await prefill.abort() == Abort(there.request_id)
    assert await decode.abort() == Abort(here.request_id)


async def test_an_answer_that_is_whole_aborts_nothing(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    answer = router.ask()
    there, here = await prefill.request(), await decode.request()
    prefill.send_tokens(there, 0, 10, done=True)
    decode.send_tokens(here, 1, 11, finish="length")
    assert await answer.whole() == [10, 11]
    await prefill.register()
    await decode.register()
    assert prefill.heard.empty()
    assert decode.heard.empty()


# --- what a response says of itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("quicker", ["prefill", "decode"])
async def test_an_answer_of_one_token_is_told_the_same_whichever_engine_is_quicker(
    quicker: str, router: RunningRouter
) -> None:
    """The decode engine, too, ends with a first token that is the last, and may be the first to tell."""
    prefill, decode = await router.pair()
    answer = router.ask(max_tokens=1)
    there, here = await prefill.request(), await decode.request()
    first, request = (prefill, there) if quicker == "prefill" else (decode, here)
    first.send_tokens(request, 0, 10, finish="length")
    assert await answer.whole() == [10]
    assert (answer.details.disaggregated, answer.details.reason) == (False, "it ended with the first token")
    assert answer.details.transport is None


async def test_of_engines_that_were_refused_so_many_are_remembered_and_each_new_one_is_told_of(
    router: RunningRouter, caplog: pytest.LogCaptureFixture
) -> None:
    await router.engine("mixed-0", "mixed")
    namesake = router.entry("mixed-0")
    assert namesake is not None
    for number in range(MAX_ENGINES + 5):
        register = make_register(EngineIdentity("mixed-0", f"life-{number}"), "mixed")
        for _ in range(2):
            router.connections._refuse(b"sender", register, namesake)
    assert len(router.connections._refused) == MAX_ENGINES
    assert sum("two engines are called mixed-0" in line.message for line in caplog.records) == MAX_ENGINES + 5

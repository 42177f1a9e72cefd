"""A router drains its engines and changes their roles, and waits until their heartbeats show it."""

from __future__ import annotations

import asyncio

import pytest

from tandem.api.backend import EngineState
from tandem.api.http_errors import NotFound
from tandem.errors import Unavailable
from tandem.router import engine_operator
from tandem.wire.control_messages import ChangeRole, DrainEngine
from tandem.wire.messages import Local
from tests.router.running_router import RunningRouter, assert_one_hand_off, within

pytestmark = pytest.mark.anyio


async def test_an_engine_that_is_to_drain_gets_no_new_requests_from_its_answer_on(router: RunningRouter) -> None:
    old, new = await router.engine("old", "mixed"), await router.engine("new", "mixed")
    draining = asyncio.create_task(router.operator.drain("old"))
    assert await within(old.told.get()) == DrainEngine()
    assert not draining.done()
    old.beat(draining=True)
    engine = await within(draining)
    assert (engine.incarnation, engine.state) == (old.identity.incarnation, EngineState.DRAINING)
    for _ in range(3):
        router.ask()
        await new.request()
    assert old.heard.empty()


async def test_one_that_had_nothing_to_finish_may_leave_at_once(router: RunningRouter) -> None:
    old = await router.engine("old", "mixed")
    draining = asyncio.create_task(router.operator.drain("old"))
    await within(old.told.get())
    old.leave()
    assert (await within(draining)).engine_id == "old"


async def test_it_may_be_asked_for_again(router: RunningRouter) -> None:
    old = await router.engine("old", "mixed", draining=True)
    assert (await within(router.operator.drain("old"))).engine_id == "old"
    assert await within(old.told.get()) == DrainEngine()


async def test_an_engine_that_is_not_there_is_named_with_those_that_are(router: RunningRouter) -> None:
    with pytest.raises(NotFound, match="no engine 'p-0' here; there is none"):
        await router.operator.drain("p-0")
    await router.pair()
    with pytest.raises(NotFound, match="no engine 'p-0' here; there is prefill-0, decode-0"):
        await router.operator.change_role("p-0", "mixed")


async def test_an_engine_that_is_lost_or_breaks_off_or_does_not_answer_is_told_of(
    router: RunningRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed = await router.engine("mixed-0", "mixed")
    monkeypatch.setattr(engine_operator, "ANSWER_SECONDS", 0.1)
    with pytest.raises(Unavailable, match=r"mixed-0 has not answered within 0\.1 s"):
        await router.operator.change_role("mixed-0", "decode")
    monkeypatch.setattr(engine_operator, "ANSWER_SECONDS", 3600.0)
    waiting = asyncio.create_task(router.operator.drain("mixed-0"))
    await within(mixed.told.get())
    await within(mixed.told.get())
    mixed.break_connection()
    with pytest.raises(Unavailable, match="mixed-0 was lost before it answered"):
        await within(waiting)
    with pytest.raises(Unavailable, match="mixed-0 is lost: its connection broke"):
        await router.operator.drain("mixed-0")


async def test_an_engine_is_used_in_its_new_role_and_ends_what_it_had_in_the_old_one(router: RunningRouter) -> None:
    prefill, decode = await router.pair()
    changing = await router.engine("changing", "mixed")
    prefill.beat(draining=True)
    await router.until(lambda: router.entry("prefill-0").state is EngineState.DRAINING)  # type: ignore[union-attr]
    before = router.ask(max_tokens=2)
    alone = await changing.request()
    assert isinstance(alone.kv, Local)
    changed = asyncio.create_task(router.operator.change_role("changing", "prefill"))
    assert await within(changing.told.get()) == ChangeRole("prefill")
    changing.role = "prefill"
    changing.beat()
    assert (await within(changed)).role == "prefill"
    after = router.ask()
    assert_one_hand_off(await changing.request(), await decode.request())
    await decode.is_introduced_to(changing)
    changing.send_tokens(alone, 0, 10, 11, finish="length")
    assert await before.whole() == [10, 11]
    await after.leave()

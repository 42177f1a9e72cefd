"""A request that waits for blocks costs a step nothing that grows with its prompt, and waits no longer for that."""

from __future__ import annotations

import pytest

from tandem.kv.blocks import BlockPool, PrefixChain
from tandem.scheduling.batch_builder import BatchBuilder
from tandem.scheduling.request import Request, RequestState
from tandem.wire.messages import Prefill
from tests.scheduling.fake_engine import FakeEngine, generate, pull
from tests.scheduling.test_properties import SchedulerMachine

PREFIX = [1, 2, 3, 4] * 4


class Matches:
    """Counts the prefixes that a pool matches."""

    def __init__(self, patch: pytest.MonkeyPatch, pool: BlockPool) -> None:
        self.count = 0
        match = pool.match_prefix

        def counted(chain: PrefixChain, max_tokens: int) -> list[int]:
            self.count += 1
            return match(chain, max_tokens)

        patch.setattr(pool, "match_prefix", counted)


def state_of(engine: FakeEngine, request_id: str) -> RequestState:
    request = engine.scheduler.get(request_id)
    assert request is not None
    return request.state


def decode(engine: FakeEngine, steps: int) -> None:
    for _ in range(steps):
        assert engine.schedule() is not None
        engine.apply()


def test_a_head_that_waits_for_blocks_is_matched_once_until_some_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(num_blocks=12)
    engine.add(generate("running", PREFIX, max_tokens=20, ignore_eos=True))
    decode(engine, 2)
    matches = Matches(monkeypatch, engine.pool)
    engine.add(generate("waiting", [*PREFIX, *[2] * 28]))  # 4 of its 11 blocks are cached, and 7 are free, not 8
    engine.add(generate("larger", [3] * 44))
    decode(engine, 15)
    assert state_of(engine, "waiting") is RequestState.WAITING
    assert matches.count == 1
    engine.abort("running")
    engine.schedule()
    assert state_of(engine, "waiting") is RequestState.RUNNING
    assert matches.count == 2


def test_a_head_is_admitted_at_once_when_more_of_its_prefix_is_cached() -> None:
    """No block was freed: that another request has computed the same prompt is what lets it in."""
    engine = FakeEngine(num_blocks=16, max_batched_tokens=4)
    engine.add(generate("first", [*PREFIX, *PREFIX, 1], Prefill()))  # all its 9 blocks at once, computed one a step
    engine.add(generate("head", [*PREFIX, *PREFIX, 2], pull()))  # 9 blocks and one to spare, where 7 are left
    states = []
    for _ in range(5):
        engine.schedule()
        states.append(state_of(engine, "head"))
        engine.apply()
    assert engine.pool.freed == 0
    assert states == [RequestState.WAITING] * 3 + [RequestState.WAITING_FOR_KV] * 2


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whenever matching is left out, it is made sure that it would have come to the same."""
    claims: list[bool] = []
    is_still_short = BatchBuilder._is_still_short

    def check(builder: BatchBuilder, request: Request, max_cached: int, needed: int) -> bool:
        claimed = is_still_short(builder, request, max_cached, needed)
        if claimed:
            pool = builder._state.pool
            hit = pool.match_prefix(request.chain, max_cached)
            assert needed - len(hit) > pool.available
            freed = pool.freed
            pool.free(hit)
            pool.freed = freed
        claims.append(claimed)
        return claimed

    monkeypatch.setattr(BatchBuilder, "_is_still_short", check)
    return claims


def test_matching_is_left_out_only_where_it_would_not_help(checked: list[bool]) -> None:
    """With all that can happen to a scheduler."""
    SchedulerMachine.TestCase("runTest").runTest()
    assert True in checked
    assert False in checked

"""A request that is aborted in any state leaves nothing behind, at once or with the last batch or read it is in."""

from __future__ import annotations

import pytest

from tandem.scheduling.request import RequestState
from tandem.wire.messages import Local, Prefill
from tests.scheduling.fake_engine import FakeEngine, generate, pull

PROMPT = [1, 2, 3, 4] * 3


def in_use(engine: FakeEngine) -> int:
    usage = engine.pool.usage()
    return usage.blocks - usage.free - usage.cached


def state_of(engine: FakeEngine, request_id: str = "r") -> RequestState:
    request = engine.scheduler.get(request_id)
    assert request is not None
    return request.state


def assert_gone(engine: FakeEngine) -> None:
    engine.abort("r")
    assert engine.scheduler.get("r") is None
    counts = engine.scheduler.counts()
    assert (counts.waiting, counts.waiting_for_kv, counts.running) == (0, 0, 0)


@pytest.mark.parametrize("kv", [Local(), Prefill(), pull()], ids=lambda kv: type(kv).__name__)
def test_while_it_waits(kv: Local | Prefill) -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, kv))
    assert state_of(engine) is RequestState.WAITING
    assert_gone(engine)
    assert in_use(engine) == 0
    assert [ended.block_ids for ended in record.prefill_ended] == ([[]] if isinstance(kv, Prefill) else [])
    assert [ended.quarantined for ended in record.pull_ended] == ([] if isinstance(kv, Local | Prefill) else [False])


def test_while_it_waits_for_kv_its_blocks_stay_until_no_read_is_in_progress() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull()))
    engine.step()
    assert state_of(engine) is RequestState.WAITING_FOR_KV
    assert_gone(engine)
    assert [ended.quarantined for ended in record.pull_ended] == [True]
    assert in_use(engine) == 3, "the block that no read goes to is free"
    engine.end_read("r")
    assert in_use(engine) == 0


@pytest.mark.parametrize("kv", [Local(), Prefill()], ids=lambda kv: type(kv).__name__)
@pytest.mark.parametrize("in_flight", [False, True])
def test_amid_its_prefill(in_flight: bool, kv: Local | Prefill) -> None:
    engine = FakeEngine(max_batched_tokens=8)
    record = engine.add(generate("r", PROMPT, kv))
    engine.schedule() if in_flight else engine.step()
    assert state_of(engine) is RequestState.RUNNING
    assert_gone(engine)
    if in_flight:
        assert in_use(engine) > 0, "the batch writes into its blocks"
        engine.apply()
    if isinstance(kv, Prefill):
        [ended] = record.prefill_ended
        assert not ended.ok
        engine.leases.pop("r")
        engine.pool.unlease(ended.block_ids)
    assert in_use(engine) == 0


def test_between_prefill_and_decode() -> None:
    """Its KV has come, and no running slot is free."""
    engine = FakeEngine(max_num_seqs=1)
    engine.add(generate("r", PROMPT, pull(), max_tokens=20))
    engine.step()
    engine.add(generate("other", PROMPT, max_tokens=20))
    engine.step()
    engine.deliver("r", first_token=True)
    assert state_of(engine) is RequestState.WAITING_FOR_SLOT
    engine.abort("other")
    assert_gone(engine)
    assert in_use(engine) == 0


@pytest.mark.parametrize("in_flight", [False, True])
def test_amid_decode(in_flight: bool) -> None:
    engine = FakeEngine()
    engine.add(generate("r", PROMPT, max_tokens=20))
    for _ in range(3):
        engine.step()
    if in_flight:
        engine.schedule()
    assert state_of(engine) is RequestState.RUNNING
    assert_gone(engine)
    if in_flight:
        engine.apply()
    assert in_use(engine) == 0

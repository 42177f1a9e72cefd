"""The scheduler by example."""

from __future__ import annotations

import msgspec
import pytest

from tandem.errors import ConfigError, EngineFailed, InvalidRequest, Overloaded, WireError
from tandem.scheduling.admission import Limits
from tandem.scheduling.batch import Sampled, StepResult
from tandem.scheduling.events import ChunkComputed, Finished, PrefillEnded, TokenOut
from tandem.wire.messages import Failed, Generate, Local, Prefill
from tandem.wire.sampling import SamplingParams
from tests.scheduling.fake_engine import EOS, VOCABULARY, FakeEngine, Record, digests, generate, pull, reference
from tests.scheduling.invariants import check_scheduler

PROMPT = [1, 2, 3, 4, 1, 2, 3]


def expected(record: Record, max_model_len: int = 64) -> list[int]:
    message = record.message
    return reference(message.token_ids, message.prompt_len, message.sampling, max_model_len)[0]


def rows(engine: FakeEngine) -> list[tuple[str, int, int]]:
    batch = engine.step()
    return [] if batch is None else [(row.request_id, row.start, len(row.tokens)) for row in batch.rows]


def failure(record: Record) -> Failed:
    (end,) = record.terminal
    assert isinstance(end, Failed)
    return end


# --- coming in ---


def test_a_prompt_without_room_for_output_is_refused_with_both_lengths() -> None:
    engine = FakeEngine(max_model_len=8)
    engine.add(generate("fits", [1] * 7))
    with pytest.raises(InvalidRequest, match=r"has 8 tokens.*at most 8 tokens"):
        engine.add(generate("r", [1] * 8))


def test_a_prompt_larger_than_the_pool_is_refused_with_both_sizes() -> None:
    engine = FakeEngine(num_blocks=2, block_size=4)
    engine.add(generate("fits", [1] * 8))
    with pytest.raises(InvalidRequest, match=r"needs 3 KV blocks.*has 2"):
        engine.add(generate("r", [1] * 9))
    with pytest.raises(InvalidRequest, match="needs 3 KV blocks"):
        engine.add(generate("r", [1] * 8, pull()))


def test_a_full_queue_says_when_to_try_again() -> None:
    engine = FakeEngine(max_waiting=1)
    engine.add(generate("a", PROMPT))
    with pytest.raises(Overloaded) as caught:
        engine.add(generate("b", PROMPT))
    assert caught.value.retry_after == 1
    assert engine.scheduler.counts().waiting == 1


def test_an_id_in_use_is_refused_and_free_again_afterwards() -> None:
    engine = FakeEngine()
    engine.add(generate("r", PROMPT))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add(generate("r", PROMPT))
    engine.abort("r")
    engine.add(generate("r", PROMPT))


@pytest.mark.parametrize(
    "message",
    [
        generate("r", [1, 99]),
        generate("r", [1], logit_bias={99: 1.0}),
        generate("r", [1, 2], prompt_len=3),
        generate("r", [1, 2, 3], prompt_len=1, max_tokens=2),
    ],
    ids=["token", "bias", "prompt_len", "nothing left"],
)
def test_what_cannot_work_is_refused(message: Generate) -> None:
    with pytest.raises(InvalidRequest):
        FakeEngine().add(message)


def test_limits_of_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        Limits(0, 1, 1, 1)


# --- steps ---


def test_decode_rows_come_before_the_next_chunk_of_a_prompt() -> None:
    engine = FakeEngine(max_batched_tokens=8)
    engine.add(generate("a", PROMPT, max_tokens=9))
    assert rows(engine) == [("a", 0, 7)]
    engine.add(generate("b", [2] * 20, max_tokens=9))
    assert rows(engine) == [("a", 7, 1), ("b", 0, 7)]
    assert rows(engine) == [("a", 8, 1), ("b", 7, 7)]
    assert rows(engine) == [("a", 9, 1), ("b", 14, 6)]
    assert rows(engine) == [("a", 10, 1), ("b", 20, 1)]


def test_a_cached_prefix_is_not_computed_again_but_for_the_last_token() -> None:
    engine = FakeEngine()
    for request_id, start in (("a", 0), ("b", 4)):
        record = engine.add(generate(request_id, [1, 2, 3, 4, 1, 2, 3, 4], max_tokens=1))
        assert rows(engine) == [(request_id, start, 8 - start)]
        (end,) = record.terminal
        assert isinstance(end, Finished)
        assert end.stats.prefix_tokens == start
        assert record.tokens == expected(record)


def test_only_requests_with_the_same_salt_find_each_others_kv() -> None:
    engine = FakeEngine()
    for request_id, salt, start in (("a", None, 0), ("b", "x", 0), ("c", "y", 0), ("d", "x", 4), ("e", None, 4)):
        message = msgspec.structs.replace(generate(request_id, [1, 2, 3, 4, 1, 2, 3, 4], max_tokens=1), cache_salt=salt)
        record = engine.add(message)
        assert rows(engine) == [(request_id, start, 8 - start)]
        assert record.tokens == expected(record)


def test_a_prompt_whose_log_probabilities_are_wanted_is_computed_whatever_is_cached() -> None:
    engine = FakeEngine(max_batched_tokens=4)
    plain = generate("a", [1, 2, 3, 4, 1, 2, 3, 4, 1], max_tokens=1)
    engine.add(plain)
    engine.run_until_done()
    sampling = msgspec.structs.replace(plain.sampling, prompt_logprobs=2)
    engine.add(msgspec.structs.replace(plain, request_id="b", sampling=sampling))
    targets = []
    for start in (0, 4, 8):
        batch = engine.step()
        assert batch is not None
        [row] = batch.rows
        assert row.start == start
        targets.append(row.score.targets if row.score else None)
    assert targets == [[2, 3, 4, 1], [2, 3, 4, 1], None]


def test_nothing_is_found_in_the_cache_before_it_is_computed() -> None:
    engine = FakeEngine(pipeline_depth=2)
    engine.add(generate("a", PROMPT))
    engine.schedule()
    engine.add(generate("b", PROMPT))
    batch = engine.schedule()
    assert batch is not None
    assert batch.rows[0].start == 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_pipeline_is_kept_full_but_not_beyond_its_depth(depth: int) -> None:
    engine = FakeEngine(pipeline_depth=depth, max_batched_tokens=4)
    record = engine.add(generate("a", PROMPT * 2, max_tokens=3))
    batches = [engine.schedule() for _ in range(depth + 1)]
    assert [batch.rows[0].start for batch in batches[:depth] if batch] == [0, 4, 8][:depth]
    assert batches[depth] is None
    engine.run_until_done()
    assert record.tokens == expected(record)


def test_a_pipeline_shares_out_decode_rows() -> None:
    engine = FakeEngine(pipeline_depth=2)
    for name in "abcd":
        engine.add(generate(name, [1, 2], max_tokens=20))
    engine.schedule()
    engine.apply()
    batches = [engine.schedule(), engine.schedule()]
    assert [[row.request_id for row in batch.rows] for batch in batches if batch] == [["a", "b"], ["c", "d"]]


def test_the_result_of_another_batch_is_refused() -> None:
    engine = FakeEngine()
    with pytest.raises(WireError, match="expected was none"):
        engine.scheduler.apply(StepResult(0, []), 0.0)
    engine.add(generate("a", PROMPT))
    engine.schedule()
    with pytest.raises(WireError, match="expected was that of batch 0"):
        engine.scheduler.apply(StepResult(1, [Sampled(1)]), 0.0)
    with pytest.raises(WireError, match="has 1 rows"):
        engine.scheduler.apply(StepResult(0, []), 0.0)
    engine.apply()


# --- ends ---


def test_output_ends_at_max_tokens_or_at_the_models_length() -> None:
    engine = FakeEngine(max_model_len=12)
    short, long = (
        engine.add(generate("short", PROMPT, max_tokens=3)),
        engine.add(generate("long", PROMPT, max_tokens=99)),
    )
    engine.run_until_done()
    assert (len(short.tokens), short.finish_reason) == (3, "length")
    assert (len(long.tokens), long.finish_reason) == (5, "length")


def sampled(engine: FakeEngine, token: int) -> list[TokenOut]:
    batch = engine.scheduler.schedule(engine.now)
    assert batch is not None
    engine.scheduler.apply(StepResult(batch.batch_id, [Sampled(token)] * len(batch.rows)), engine.now)
    return [event for event in engine.scheduler.drain() if isinstance(event, TokenOut)]


def test_stop_tokens_end_a_request_but_not_before_min_tokens() -> None:
    engine = FakeEngine()
    sampling = SamplingParams(max_tokens=9, min_tokens=1, stop_token_ids=[3])
    engine.scheduler.add(Generate("r", [1], 1, sampling, 1e9), 0.0)
    batch = engine.scheduler.schedule(0.0)
    assert batch is not None
    assert batch.rows[0].sample is not None
    assert batch.rows[0].sample.banned_ids == [EOS, 3]
    engine.scheduler.apply(StepResult(0, [Sampled(EOS)]), 0.0)
    (first,) = engine.scheduler.drain()
    assert isinstance(first, TokenOut)
    assert first.finish_reason is None
    (second,) = sampled(engine, 3)
    assert (second.index, second.finish_reason, second.stop_token_id) == (1, "stop", 3)


def test_eos_ends_a_request_unless_it_is_to_be_ignored() -> None:
    for ignore, reason in ((False, "stop"), (True, None)):
        engine = FakeEngine()
        engine.scheduler.add(generate("r", [1], max_tokens=9, ignore_eos=ignore), 0.0)
        (token,) = sampled(engine, EOS)
        assert token.finish_reason == reason


def test_history_goes_along_only_where_penalties_need_it() -> None:
    engine = FakeEngine()
    engine.add(generate("plain", [1, 2]))
    engine.add(generate("penalised", [1, 2, 3], prompt_len=2, presence_penalty=0.5))
    batch = engine.schedule()
    assert batch is not None
    assert [row.history for row in batch.rows] == [None, [1, 2, 3]]


@pytest.mark.parametrize(
    ("output", "runs", "banned"),
    [
        ([], [[3]], [3]),
        ([1, 2], [[1, 2, 3], [2, 1], [4, 4, 1, 2, 3]], [3, 1]),  # the last would begin in the prompt
        ([2], [[4, 2, 3]], []),
        ([1, 2, 2], [[1, 2, 3]], []),
    ],
)
def test_a_token_that_would_complete_a_banned_run_is_banned(
    output: list[int], runs: list[list[int]], banned: list[int]
) -> None:
    engine = FakeEngine()
    engine.add(generate("r", [4, 4, *output], prompt_len=2, max_tokens=9, banned_runs=runs))
    batch = engine.schedule()
    assert batch is not None
    assert batch.rows[0].sample is not None
    assert batch.rows[0].sample.banned_ids == banned


def test_a_resumed_request_goes_on_with_its_output() -> None:
    engine = FakeEngine()
    whole = engine.add(generate("whole", PROMPT, max_tokens=6))
    engine.run_until_done()
    resumed = engine.add(generate("resumed", PROMPT + whole.tokens[:2], prompt_len=len(PROMPT), max_tokens=6))
    engine.run_until_done()
    assert resumed.outputs == {index: whole.tokens[index] for index in range(2, 6)}


def test_a_row_that_cannot_be_sampled_fails_alone_and_leaves_nothing_in_the_cache() -> None:
    engine = FakeEngine(max_batched_tokens=8)
    bad, good = (engine.add(generate(name, [token] * 13, max_tokens=3)) for name, token in (("bad", 1), ("good", 2)))
    engine.broken["bad"] = EngineFailed("the logits are not numbers")
    engine.run_until_done()
    assert failure(bad).code == EngineFailed.code
    assert "not numbers" in failure(bad).message
    assert good.tokens == expected(good)
    assert engine.pool.usage().cached == len([*good.message.token_ids, *good.tokens[:-1]]) // 4


def test_a_row_without_the_token_that_was_due_fails() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT))
    engine.schedule()
    engine.scheduler.apply(StepResult(0, [None]), 0.0)
    engine.settle()
    assert failure(record).code == EngineFailed.code


def test_a_deadline_ends_a_request_wherever_it_is() -> None:
    engine = FakeEngine(max_num_seqs=1)
    records = [
        engine.add(generate("running", PROMPT, time_left=5.0)),
        engine.add(generate("waiting", PROMPT, time_left=5.0)),
        engine.add(generate("pulling", PROMPT, pull(), time_left=5.0)),
        engine.add(generate("patient", PROMPT, max_tokens=2)),
    ]
    engine.schedule()
    engine.now = 4.9
    engine.expire()
    assert not any(record.terminal for record in records)
    engine.now = 5.0
    engine.expire()
    assert [failure(record).code for record in records[:3]] == ["timed_out"] * 3
    assert "waiting for KV" in failure(records[2]).message
    engine.run_until_done()
    assert records[3].tokens == expected(records[3])


def test_the_deadline_of_an_old_request_does_not_end_a_new_one_with_its_id() -> None:
    engine = FakeEngine()
    engine.add(generate("r", PROMPT, time_left=5.0))
    engine.abort("r")
    record = engine.add(generate("r", PROMPT, time_left=50.0))
    engine.now = 6.0
    engine.expire()
    assert not record.terminal


def test_an_abort_gives_blocks_back_only_when_the_batch_is_back() -> None:
    engine = FakeEngine()
    engine.add(generate("r", PROMPT))
    engine.schedule()
    engine.abort("r")
    engine.abort("r")
    engine.abort("never seen")
    assert engine.pool.usage().in_use == 2
    engine.apply()
    assert engine.pool.usage().in_use == 0


def test_the_caller_can_end_a_request_with_its_own_error() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull()))
    engine.schedule()
    engine.scheduler.fail("r", EngineFailed("the peer refused"), 1.0)
    engine.scheduler.fail("r", EngineFailed("again"), 1.0)
    engine.settle()
    assert failure(record).message == "the peer refused"
    assert record.pull_ended[0].quarantined


# --- running out of blocks ---


def test_the_latest_arrival_is_preempted_and_continues_with_the_same_tokens() -> None:
    engine = FakeEngine(num_blocks=6, block_size=2)
    records = [engine.add(generate(name, [token] * 4, max_tokens=7)) for name, token in (("a", 1), ("b", 2))]
    engine.run_until_done()
    assert engine.scheduler.totals.preemptions > 0
    for record in records:
        assert record.tokens == expected(record)
    first, second = (record.terminal[0] for record in records)
    assert isinstance(first, Finished)
    assert isinstance(second, Finished)
    assert first.stats.recomputations == 0
    assert second.stats.recomputations > 0
    assert second.stats.recompute_reason == "preempted: the engine ran out of KV blocks"


def test_a_request_that_outgrows_the_whole_pool_fails_and_says_how_much_it_needs() -> None:
    engine = FakeEngine(num_blocks=3, block_size=2)
    record = engine.add(generate("r", [1, 2, 3, 4], max_tokens=20))
    engine.run_until_done()
    assert "need 4 KV blocks of 2 tokens; this engine has 3" in failure(record).message
    assert record.tokens == expected(record)[:3]


def test_a_running_request_waits_for_leased_blocks_without_losing_its_own() -> None:
    engine = FakeEngine(num_blocks=4, block_size=2)
    engine.add(generate("leased", [1] * 4, Prefill()))
    record = engine.add(generate("r", [2] * 3, max_tokens=3))
    while engine.step() is not None:
        pass
    assert len(record.tokens) == 2
    assert engine.pool.usage().leased == 2
    engine.end_lease("leased")
    engine.run_until_done()
    assert record.tokens == expected(record)
    assert engine.scheduler.totals.preemptions == 0


def test_a_request_with_kv_but_no_running_slot_gives_its_blocks_to_one_that_runs() -> None:
    engine = FakeEngine(num_blocks=6, block_size=2, max_num_seqs=1)
    early = engine.add(generate("early", [1] * 5, pull(), max_tokens=4))
    running = engine.add(generate("running", [2] * 3, max_tokens=6))
    engine.step()
    engine.deliver("early", first_token=True)
    engine.run_until_done()
    assert early.tokens == expected(early)
    assert running.tokens == expected(running)


# --- Prefill ---


def test_a_prefill_request_announces_each_chunk_and_ends_after_one_token() -> None:
    engine = FakeEngine(max_batched_tokens=6)
    record = engine.add(generate("r", [1, 2, 3, 4] * 4, Prefill(), max_tokens=9))
    engine.run_until_done()
    assert [(c.first_block, len(c.block_ids), c.num_tokens, c.final) for c in record.chunks] == [
        (0, 2, 6, False),
        (1, 2, 12, False),
        (3, 1, 16, True),
    ]
    assert record.chunks[-1].token == expected(record)[0]
    assert record.outputs == {0: expected(record)[0]}
    (end,) = record.terminal
    assert isinstance(end, Finished)
    assert end.finish_reason is None


def test_a_prefill_whose_first_token_is_its_last_says_so() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, Prefill(), max_tokens=1))
    engine.run_until_done()
    (end,) = record.terminal
    assert isinstance(end, Finished)
    assert end.finish_reason == record.finish_reason == "length"


def test_cached_blocks_are_announced_with_the_first_chunk() -> None:
    engine = FakeEngine()
    engine.add(generate("before", [1, 2, 3, 4] * 2, max_tokens=1))
    engine.run_until_done()
    record = engine.add(generate("r", [1, 2, 3, 4] * 2 + [1], Prefill()))
    assert rows(engine) == [("r", 8, 1)]
    assert [(c.first_block, len(c.block_ids), c.num_tokens) for c in record.chunks] == [(0, 3, 9)]


def test_the_blocks_of_a_prefill_stay_leased_until_the_caller_ends_the_lease() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, Prefill()))
    engine.step()
    (end,) = record.prefill_ended
    assert end.ok
    assert engine.pool.usage().leased == len(end.block_ids) == 2
    assert engine.scheduler.get("r") is None
    engine.end_lease("r")
    assert engine.pool.usage().leased == 0


def test_an_aborted_prefill_hands_its_blocks_over_as_somebody_may_be_reading_them() -> None:
    engine = FakeEngine(max_batched_tokens=4)
    record = engine.add(generate("r", PROMPT, Prefill()))
    engine.step()
    engine.schedule()
    engine.abort("r")
    assert record.prefill_ended == []
    engine.apply()
    (end,) = record.prefill_ended
    assert (end.ok, len(end.block_ids)) == (False, 2)
    assert engine.pool.usage().leased == 2


def test_a_prefill_that_was_never_admitted_has_no_blocks_to_hand_over() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, Prefill()))
    engine.abort("r")
    assert record.prefill_ended == [PrefillEnded("r", [], False)]


def test_a_prefill_is_never_preempted() -> None:
    engine = FakeEngine(num_blocks=6, block_size=2, max_batched_tokens=3)
    local = engine.add(generate("local", [1] * 3, max_tokens=8))
    engine.step()
    prefill = engine.add(generate("prefill", [2] * 5, Prefill()))
    engine.run_until_done()
    assert [chunk.num_tokens for chunk in prefill.chunks] == [2, 4, 5]
    assert local.tokens == expected(local)


# --- PullKv ---


def test_a_pull_gets_blocks_for_its_prompt_and_one_token_more() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", [1, 2, 3, 4] * 2, pull()))
    assert engine.schedule() is None
    assert record.allocated is not None
    assert len(record.allocated.block_ids) == 3
    assert (record.allocated.num_cached_tokens, record.allocated.num_tokens) == (0, 8)
    assert engine.scheduler.counts().waiting_for_kv == 1


def test_after_a_pull_decode_goes_on_with_the_second_token() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull(), max_tokens=4))
    engine.schedule()
    engine.deliver("r", first_token=True)
    assert rows(engine) == [("r", 7, 1)]
    engine.run_until_done()
    assert record.tokens == expected(record)


def test_without_a_first_token_the_last_token_of_the_prompt_is_computed_here() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull(first_token=False), max_tokens=4))
    engine.schedule()
    engine.deliver("r", first_token=False)
    assert rows(engine) == [("r", 6, 1)]
    engine.run_until_done()
    assert record.tokens == expected(record)


def test_a_first_token_that_is_the_last_one_ends_the_request_at_once() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull(), max_tokens=1))
    engine.schedule()
    engine.deliver("r", first_token=True)
    (end,) = record.terminal
    assert isinstance(end, Finished)
    assert (end.finish_reason, record.outputs) == ("length", {0: expected(record)[0]})


def test_pulled_blocks_serve_as_a_prefix_and_only_what_misses_is_pulled() -> None:
    engine = FakeEngine()
    tokens = [1, 2, 3, 4] * 2
    engine.add(generate("a", tokens, pull(), max_tokens=2))
    engine.schedule()
    engine.deliver("a", first_token=True)
    longer = engine.add(generate("b", [*tokens, 1], pull()))
    same = engine.add(generate("c", tokens, pull()))
    alone = engine.add(generate("d", tokens, pull(first_token=False)))
    engine.schedule()
    assert [record.allocated and record.allocated.num_cached_tokens for record in (longer, same, alone)] == [8, 8, 4]
    engine.deliver("c", first_token=True)
    engine.run_until_done()
    assert same.tokens == expected(same)


def test_a_first_token_that_does_not_come_does_not_write_into_shared_blocks() -> None:
    engine = FakeEngine()
    tokens = [1, 2, 3, 4]
    for name in ("a", "b"):
        record = engine.add(generate(name, tokens, pull(), max_tokens=2))
        engine.schedule()
        engine.deliver(name, first_token=name == "a")
    engine.run_until_done()
    assert record.tokens == expected(record)
    (end,) = record.terminal
    assert isinstance(end, Finished)
    assert end.stats.recompute_reason == "the peer sent no first token"


def test_a_first_token_beyond_the_vocabulary_is_not_given_to_the_model() -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull(), max_tokens=4))
    engine.schedule()
    allocated = engine.reads.pop("r")
    engine.write(allocated, digests(PROMPT))
    engine.scheduler.kv_arrived("r", VOCABULARY, engine.now)
    engine.run_until_done()
    assert record.tokens == expected(record)
    (end,) = record.terminal
    assert isinstance(end, Finished)
    assert end.stats.recompute_reason == f"the peer's first token is {VOCABULARY}; this model has {VOCABULARY} tokens"


@pytest.mark.parametrize("first_token", [True, False])
def test_lost_kv_is_computed_here(first_token: bool) -> None:
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull(), max_tokens=4))
    engine.schedule()
    engine.lose_kv("r", reading=False, first_token=first_token)
    assert rows(engine) == [("r", 0, 8 if first_token else 7)]
    engine.run_until_done()
    assert record.tokens == expected(record)
    (end,) = record.terminal
    assert isinstance(end, Finished)
    assert (end.stats.recomputations, end.stats.recompute_reason) == (1, "the peer was lost")


def test_kv_that_is_lost_before_admission_is_computed_in_its_turn() -> None:
    engine = FakeEngine()
    engine.add(generate("first", PROMPT))
    engine.add(generate("lost", [2] * 3, pull()))
    engine.add(generate("last", [3] * 3))
    engine.lose_kv("lost", reading=False, first_token=False)
    assert [request_id for request_id, _, _ in rows(engine)] == ["first", "lost", "last"]


@pytest.mark.parametrize("way", ["failed", "aborted", "expired"])
def test_blocks_that_are_being_read_into_stay_out_of_the_pool_until_the_read_has_ended(way: str) -> None:
    engine = FakeEngine(num_blocks=4, block_size=4)
    engine.add(generate("r", PROMPT, pull(), time_left=5.0))
    engine.schedule()
    if way == "failed":
        engine.lose_kv("r", reading=True, first_token=False)
        engine.abort("r")
    elif way == "aborted":
        engine.abort("r")
    else:
        engine.now = 5.0
        engine.expire()
    assert engine.pool.usage().quarantined == 2
    with pytest.raises(InvalidRequest, match="in use"):
        engine.add(generate("r", PROMPT))
    other = engine.add(generate("other", [3] * 7, max_tokens=2))
    while engine.step() is not None:
        engine.scribble("r")
    assert other.tokens == expected(other)
    engine.end_read("r")
    engine.scheduler.read_ended("r")
    assert engine.pool.usage().quarantined == 0


def test_a_pull_with_nothing_to_read_has_nothing_to_quarantine() -> None:
    engine = FakeEngine()
    engine.add(generate("a", [1, 2, 3, 4], max_tokens=1))
    engine.run_until_done()
    record = engine.add(generate("r", [1, 2, 3, 4], pull()))
    engine.schedule()
    engine.abort("r")
    assert not record.pull_ended[0].quarantined
    assert engine.pool.usage().quarantined == 0


def test_messages_about_requests_that_are_gone_change_nothing() -> None:
    engine = FakeEngine()
    engine.add(generate("local", PROMPT))
    engine.step()
    for request_id in ("gone", "local"):
        engine.scheduler.kv_arrived(request_id, 1, 0.0)
        engine.scheduler.kv_failed(request_id, "late", 0.0, reading=True)
        engine.scheduler.read_ended(request_id)
    assert engine.scheduler.drain() == []
    check_scheduler(engine.scheduler)


def test_slow_peers_take_no_running_slot_from_local_requests() -> None:
    engine = FakeEngine(max_num_seqs=2)
    for name in "abc":
        engine.add(generate(name, [1, 2, 3], pull()))
    local = engine.add(generate("local", [2, 3], max_tokens=2))
    engine.step()
    assert engine.scheduler.counts().waiting_for_kv == 2
    engine.step()
    assert local.terminal


def test_running_slots_are_given_in_the_order_of_arrival() -> None:
    engine = FakeEngine(max_num_seqs=1)
    engine.add(generate("a", [1], max_tokens=2))
    engine.add(generate("pulled", [1, 2], pull(), max_tokens=2))
    engine.add(generate("local", [3], max_tokens=1))
    engine.step()
    engine.deliver("pulled", first_token=True)
    assert [rows(engine)[0][0] for _ in range(3)] == ["a", "pulled", "local"]


def test_a_request_with_its_kv_does_not_stand_behind_an_earlier_arrival_that_waits_for_blocks() -> None:
    engine = FakeEngine(num_blocks=6, block_size=2, max_num_seqs=1)
    engine.add(generate("running", [1] * 2, max_tokens=1))
    large = engine.add(generate("large", [3] * 11, max_tokens=1))
    pulled = engine.add(generate("pulled", [2] * 3, pull(), max_tokens=3))
    engine.schedule()
    engine.deliver("pulled", first_token=True)
    engine.apply()
    engine.run_until_done(max_steps=20)
    assert pulled.tokens == expected(pulled)
    assert large.tokens == expected(large)


# --- counting ---


def test_stats_tell_how_long_each_part_took() -> None:
    engine = FakeEngine(max_batched_tokens=4)
    local = engine.add(generate("local", PROMPT, max_tokens=1))
    pulled = engine.add(generate("pulled", [2] * 3, pull(), max_tokens=1))
    engine.now = 2.0
    engine.schedule()
    engine.now = 3.0
    engine.apply()
    engine.schedule()
    engine.now = 5.0
    engine.apply()
    engine.now = 6.5
    engine.deliver("pulled", first_token=True)
    (a,), (b,) = local.terminal, pulled.terminal
    assert isinstance(a, Finished)
    assert isinstance(b, Finished)
    assert (a.stats.queue_time, a.stats.prefill_time, a.stats.transfer_time) == (2.0, 3.0, 0.0)
    assert (b.stats.queue_time, b.stats.prefill_time, b.stats.transfer_time) == (2.0, 0.0, 4.5)


def test_totals_count_what_was_done() -> None:
    engine = FakeEngine()
    for name in ("a", "b"):
        engine.add(generate(name, [1, 2, 3, 4, 1], max_tokens=2))
        engine.run_until_done()
    totals = engine.scheduler.totals
    assert (totals.requests, totals.requests_failed, totals.steps) == (2, 0, 4)
    assert (totals.prompt_tokens, totals.output_tokens, totals.prefix_tokens) == (10, 4, 4)


def test_chunks_of_local_requests_are_not_announced() -> None:
    engine = FakeEngine()
    engine.scheduler.add(generate("r", PROMPT, Local()), 0.0)
    batch = engine.scheduler.schedule(0.0)
    assert batch is not None
    engine.scheduler.apply(StepResult(batch.batch_id, [Sampled(1)]), 0.0)
    assert not [event for event in engine.scheduler.drain() if isinstance(event, ChunkComputed)]


@pytest.mark.parametrize(("token", "computed_here"), [(VOCABULARY - 1, 0), (VOCABULARY, 1), (2**31 - 1, 1)])
def test_a_first_token_beyond_the_vocabulary_is_not_taken(token: int, computed_here: int) -> None:
    """It would fail the whole batch in the embedding."""
    engine = FakeEngine()
    record = engine.add(generate("r", PROMPT, pull()))
    engine.step()
    engine.scheduler.kv_arrived("r", token, engine.now)
    scheduled = engine.scheduler.get("r")
    assert scheduled is not None
    assert scheduled.recomputations == computed_here
    assert (scheduled.tokens == [*PROMPT, token]) == (not computed_here)
    assert record.terminal == []
    check_scheduler(engine.scheduler)


def test_it_says_when_a_request_begins_and_ceases_to_wait_for_room() -> None:
    engine = FakeEngine(num_blocks=4)
    engine.add(generate("first", PROMPT, Prefill()))
    engine.step()
    assert not engine.short_of_blocks
    engine.add(generate("second", [2] * 12))
    engine.step()
    assert engine.short_of_blocks
    engine.end_lease("first")
    engine.step()
    assert not engine.short_of_blocks

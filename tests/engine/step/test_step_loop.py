"""The step loop with a real scheduler, and everything around it played by the test."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from tandem.engine.mailbox import Mailbox
from tandem.engine.outbox import KvEvent
from tandem.engine.step.masks import MaskMaker
from tandem.engine.step.step_loop import StepLoop
from tandem.engine.step_clock import StepClock
from tandem.engine.step_commands import (
    AbortRequest,
    Command,
    Fail,
    KvArrived,
    KvCorrupt,
    KvFailed,
    LeasesEnded,
    ReadsEnded,
    Shutdown,
    StartRequest,
)
from tandem.errors import RankLost
from tandem.ids import output_digest
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits
from tandem.scheduling.batch import Batch, Sampled, StepResult
from tandem.scheduling.events import BlocksAllocated, ChunkComputed, PrefillEnded, PullEnded
from tandem.scheduling.scheduler import Scheduler
from tandem.transfer.decode.pull import Pull as Transfer
from tandem.wire.engine_status import EngineCounters, KvUsage, RequestCounts
from tandem.wire.messages import Address, Failed, Generate, KvTransferParams, Local, Output, Prefill, PullKv, Tokens
from tandem.wire.sampling import SamplingParams
from tests.scheduling.invariants import check_scheduler
from tests.support.grammars import no_grammars

PUBLISHED = KvTransferParams(do_remote_prefill=True, remote_engine_id="p0", remote_incarnation="life", tp_size=2)
SOURCE = PullKv("p0", "life", Address("127.0.0.1", 1), "remote")
BLOCK = 4


class FakePipeline:
    """The next token is always one more than the last; results come `late` submissions later."""

    def __init__(self, late: int = 0) -> None:
        self.batches: list[Batch] = []
        self._late = late
        self._results: deque[StepResult] = deque()
        self.hang, self.hanging, self.held = threading.Event(), threading.Event(), threading.Event()
        self.hang.set()

    def submit(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.hanging.set()
        assert self.hang.wait(20)
        sampled = [Sampled((row.tokens[-1] + 1) % 100) if row.sample is not None else None for row in batch.rows]
        self._results.append(StepResult(batch.batch_id, sampled))

    def results(self) -> list[StepResult]:
        done: list[StepResult] = []
        while not self.held.is_set() and len(self._results) > self._late:
            done.append(self._results.popleft())
        self._late = 0
        return done

    def fileno(self) -> int | None:
        return None


class FakeOutbox:
    def __init__(self) -> None:
        self.order: list[str] = []
        self.kv: list[KvEvent] = []
        self.counters: list[EngineCounters] = []
        self.outputs: list[tuple[int, Output]] = []
        self.changed = threading.Condition()

    def post_kv(self, events: list[KvEvent]) -> None:
        with self.changed:
            self.order.append("kv")
            self.kv += events
            self.changed.notify_all()

    def post_outputs(self, outputs: dict[int, list[Output]]) -> None:
        with self.changed:
            self.order.append("outputs")
            self.outputs += [(frontend, item) for frontend, items in outputs.items() for item in items]
            self.changed.notify_all()

    def post_status(self, kv: KvUsage, requests: RequestCounts, counters: EngineCounters) -> None:
        with self.changed:
            self.usage = kv
            self.counters.append(counters)
            self.changed.notify_all()


class Rig:
    """A step loop in a thread of its own. `before`: commands that it finds when it starts."""

    def __init__(
        self,
        policy: Any = "recompute",
        depth: int = 1,
        max_waiting: int = 8,
        before: Sequence[Command] = (),
        masks: MaskMaker | None = None,
    ) -> None:
        self.pool = BlockPool(64, BLOCK)
        limits = Limits(max_num_seqs=4, max_batched_tokens=16, max_waiting=max_waiting, max_model_len=64)
        self.scheduler = Scheduler(limits, self.pool, [99], depth)
        self.mailbox: Mailbox[Command] = Mailbox()
        self.send(*before)
        self.pipeline = FakePipeline(late=depth - 1)
        self.outbox = FakeOutbox()
        self.clock = StepClock()
        loop = StepLoop(
            self.scheduler,
            self.pool,
            self.pipeline,
            self.mailbox,
            self.outbox,
            "tcp",
            policy,
            PUBLISHED,
            self.clock,
            masks or no_grammars(),
        )
        self.reason: list[str] = []
        self.thread = threading.Thread(target=lambda: self.reason.append(loop.run()))
        self.thread.start()

    def start(self, request_id: str, tokens: list[int], kv: Any = None, frontend: int = 0, **fields: Any) -> None:
        time_left = fields.pop("time_left", 60.0)
        sampling = SamplingParams(**({"max_tokens": 3, "ignore_eos": True} | fields))
        self.send(StartRequest(frontend, Generate(request_id, tokens, len(tokens), sampling, time_left, kv or Local())))

    def send(self, *commands: Command) -> None:
        for command in commands:
            self.mailbox.put(command)

    def until(self, found: Any) -> None:
        with self.outbox.changed:
            assert self.outbox.changed.wait_for(found, 20.0)

    def of(self, request_id: str) -> list[Output]:
        return [item for _, item in self.outbox.outputs if item.request_id == request_id]

    def end_of(self, request_id: str) -> Output:
        """The terminal message, once it has come."""
        self.until(lambda: any(ends(item) for item in self.of(request_id)))
        return self.of(request_id)[-1]

    def kv_events(self, kind: type) -> list[Any]:
        return [event for event in self.outbox.kv if isinstance(event, kind)]

    def stop(self) -> None:
        self.send(Shutdown("enough"))
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert self.reason == ["enough"]
        self.mailbox.close()
        for request_id in {item.request_id for _, item in self.outbox.outputs}:
            assert [ends(item) for item in self.of(request_id)].count(True) <= 1, "a request has ended twice"
        check_scheduler(self.scheduler)


def ends(item: Output) -> bool:
    return isinstance(item, Failed) or (isinstance(item, Tokens) and item.done)


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Any:
    made: list[Rig] = []

    def make(**options: Any) -> Rig:
        made.append(Rig(**options))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def arrived(request_id: str, blocks: list[int], tokens: int, first_token: int) -> Transfer:
    pull = Transfer(request_id, "remote", "p0", True)
    pull.source_blocks, pull.destination_blocks, pull.announced_tokens, pull.final = blocks, blocks, tokens, True
    pull.first_token, pull.bytes, pull.descriptors, pull.job_seconds = first_token, 640, 5, {1: 0.25}
    pull.final_at = time.monotonic()
    return pull


def tokens_of(items: list[Output]) -> list[int]:
    places = [(item.index + n, token) for item in items for n, token in enumerate(item.token_ids)]  # type: ignore[union-attr]
    assert [place for place, _ in places] == sorted({place for place, _ in places})
    return [token for _, token in places]


@pytest.mark.parametrize("depth", [1, 2])
def test_every_request_ends_with_one_message_to_its_own_frontend(rig: Any, depth: int) -> None:
    it = rig(depth=depth)
    for number in range(6):
        it.start(f"r{number}", [number * 10, number * 10 + 1], frontend=number % 2)
    for number in range(6):
        end = it.end_of(f"r{number}")
        assert isinstance(end, Tokens)
        assert (end.finish_reason, end.done) == ("length", True)
        assert tokens_of(it.of(f"r{number}")) == [number * 10 + 2, number * 10 + 3, number * 10 + 4]
        assert {frontend for frontend, item in it.outbox.outputs if item.request_id == f"r{number}"} == {number % 2}


def test_stats_come_with_the_first_and_the_last_message(rig: Any) -> None:
    it = rig()
    it.start("r", [1, 2], max_tokens=4)
    it.end_of("r")
    assert [item.stats is not None for item in it.of("r")] == [True, False, False, True]
    assert it.of("r")[0].stats.transport is None


def test_a_refused_request_fails_at_once_and_what_was_begun_for_it_is_undone(rig: Any) -> None:
    it = rig()
    it.start("local", [1] * 64)
    it.start("prefill", [1] * 64, Prefill())
    it.start("pull", [1] * 64, SOURCE)
    for request_id in ("local", "prefill", "pull"):
        end = it.end_of(request_id)
        assert isinstance(end, Failed)
        assert (end.code, end.param) == ("invalid_request", "prompt")
    assert it.outbox.kv == [PrefillEnded("prefill", [], ok=False), PullEnded("pull", quarantined=False)]


def test_too_many_are_told_when_to_come_again(rig: Any) -> None:
    at_once = [
        StartRequest(0, Generate(f"r{number}", [1], 1, SamplingParams(max_tokens=1), 60.0)) for number in range(12)
    ]
    it = rig(max_waiting=1, before=at_once)
    found = [it.end_of(f"r{number}") for number in range(12)]
    refused = [end for end in found if isinstance(end, Failed)]
    assert len(refused) >= 1
    assert {(end.code, end.retry_after) for end in refused} == {("overloaded", 1)}


def test_a_deadline_is_one_failure(rig: Any) -> None:
    it = rig()
    it.start("r", [1], SOURCE, time_left=0.05)
    end = it.end_of("r")
    assert isinstance(end, Failed)
    assert end.code == "timed_out"
    it.until(lambda: it.kv_events(PullEnded))


def test_nothing_is_said_of_an_aborted_request(rig: Any) -> None:
    it = rig()
    it.start("r", [1], SOURCE)
    it.until(lambda: it.kv_events(BlocksAllocated))
    it.send(AbortRequest("r"), AbortRequest("unknown"))
    it.until(lambda: it.kv_events(PullEnded))
    it.start("s", [1])
    it.end_of("s")
    assert it.of("r") == []
    it.send(ReadsEnded("r"))


def test_a_prefill_announces_its_chunks_before_its_token_and_keeps_its_blocks_until_the_lease_ends(rig: Any) -> None:
    it = rig()
    it.start("r", list(range(20)), Prefill())  # two chunks of at most 16 tokens
    end = it.end_of("r")
    chunks = it.kv_events(ChunkComputed)
    assert [(c.num_tokens, c.final, c.token) for c in chunks] == [(16, False, None), (20, True, 20)]
    assert it.outbox.order == ["kv", "kv", "outputs"]
    assert isinstance(end, Tokens)
    assert (end.token_ids, end.finish_reason, end.kv_transfer_params) == ([20], None, None)
    assert it.pool.usage().leased == 5
    it.send(LeasesEnded(["r", "unknown"]), LeasesEnded(["r"]))
    it.start("s", [1])
    it.end_of("s")
    assert it.pool.usage().leased == 0


def test_kv_that_a_reader_found_damaged_is_found_by_no_later_request(rig: Any) -> None:
    it = rig()
    tokens = list(range(20))
    for request_id, cached in (("r", 0), ("s", 16), ("t", 0)):
        it.start(request_id, tokens, Prefill())
        end = it.end_of(request_id)
        assert isinstance(end, Tokens)
        assert end.stats is not None
        assert end.stats.prefix_tokens == cached
        if request_id == "s":
            it.send(KvCorrupt(["s", "unknown"]))
        it.send(LeasesEnded([request_id]))


def test_a_published_prefill_tells_what_a_foreign_proxy_needs(rig: Any) -> None:
    it = rig()
    it.start("r", list(range(6)), Prefill(published=True))
    params = it.end_of("r").kv_transfer_params
    [chunk] = it.kv_events(ChunkComputed)
    assert params == KvTransferParams(
        do_remote_prefill=True, remote_engine_id="p0", remote_incarnation="life", tp_size=2, remote_request_id="r",
        remote_block_ids=chunk.block_ids,
    )  # fmt: skip


def test_a_pull_goes_on_after_the_first_token_and_tells_how_it_was_moved(rig: Any) -> None:
    it = rig()
    it.start("r", list(range(8)), SOURCE)
    it.until(lambda: it.kv_events(BlocksAllocated))
    [ready] = it.kv_events(BlocksAllocated)
    it.send(KvArrived(arrived("r", ready.block_ids, 8, 8)))
    end = it.end_of("r")
    assert tokens_of(it.of("r")) == [9, 10]
    assert it.of("r")[0].index == 1
    stats = end.stats
    assert stats is not None
    assert (stats.transport, stats.bytes, stats.descriptors, stats.blocks) == ("tcp", 640, 5, 2)
    assert stats.transfer_time == 0.25
    assert stats.handoff_time > 0.0


def test_a_first_token_that_ends_the_request_is_told_with_its_end(rig: Any) -> None:
    it = rig()
    it.start("r", [1, 2], SOURCE, max_tokens=1)
    it.until(lambda: it.kv_events(BlocksAllocated))
    it.send(KvArrived(arrived("r", it.kv_events(BlocksAllocated)[0].block_ids, 2, 7)))
    end = it.end_of("r")
    assert isinstance(end, Tokens)
    assert (end.index, end.token_ids, end.finish_reason, end.done) == (0, [7], "length", True)
    assert len(it.of("r")) == 1
    assert it.pipeline.batches == []


@pytest.mark.parametrize(("policy", "code"), [("retry", "kv_retry"), ("fail", "kv_lost"), ("recompute", None)])
def test_lost_kv_is_dealt_with_by_policy_and_its_blocks_wait_for_the_reads(
    rig: Any, policy: str, code: str | None
) -> None:
    it = rig(policy=policy)
    it.start("r", list(range(8)), SOURCE)
    it.until(lambda: it.kv_events(BlocksAllocated))
    it.send(KvFailed("r", "the lease ended"))
    end = it.end_of("r")
    if code is None:
        assert tokens_of(it.of("r")) == [8, 9, 10]
        assert end.stats.recompute_reason == "the lease ended"
    else:
        assert isinstance(end, Failed)
        assert end.code == code
        assert "the lease ended" in end.message
        assert it.kv_events(PullEnded) == [PullEnded("r", quarantined=True)]
    it.start("s", [50])
    it.end_of("s")
    assert it.pool.usage().quarantined == 2
    it.send(ReadsEnded("r"), ReadsEnded("r"))
    it.start("t", [60])
    it.end_of("t")
    assert it.pool.usage().quarantined == 0


def test_a_first_token_that_is_known_is_gone_on_from_when_the_kv_is_lost(rig: Any) -> None:
    """The client has it from the prefill engine; another choice would make another text."""
    it = rig()
    it.start("r", [1, 2], SOURCE)
    it.until(lambda: it.kv_events(BlocksAllocated))
    it.send(KvFailed("r", "the lease ended", first_token=50), ReadsEnded("r"))
    it.end_of("r")
    assert [(item.index, item.token_ids, item.digest) for item in it.of("r")] == [
        (1, [51], output_digest([50])),
        (2, [52], output_digest([50, 51])),
    ]


def test_the_clock_runs_while_a_step_does_and_only_then(rig: Any) -> None:
    """Another thread reads it, however long the step hangs."""
    it = rig()
    it.until(lambda: it.clock.since is None)
    assert it.clock.seconds() == 0.0
    it.pipeline.hang.clear()
    it.start("r", [1, 2])
    it.pipeline.hanging.wait(20)
    first = it.clock.seconds()
    assert it.clock.since is not None
    assert it.clock.seconds() >= first
    it.pipeline.hang.set()
    it.end_of("r")
    it.until(lambda: it.clock.since is None)


def test_the_clock_runs_from_the_oldest_batch_in_flight(rig: Any) -> None:
    """The results of a pipeline of several stages come from another rank, which may hang while this one does not."""
    it = rig(depth=2)
    it.pipeline.held.set()
    it.start("r", [1, 2])
    it.until(lambda: it.pipeline.batches)
    since = it.clock.since
    it.start("s", [3, 4])
    it.until(lambda: len(it.pipeline.batches) == 2)
    for _ in range(3):
        it.send(AbortRequest("nobody"))
    it.until(lambda: it.clock.since == since)
    it.pipeline.held.clear()
    it.send(AbortRequest("nobody"))
    it.end_of("r")
    it.end_of("s")


def test_kv_that_arrives_for_a_request_that_has_ended_changes_nothing(rig: Any) -> None:
    it = rig()
    it.send(
        KvArrived(arrived("r", [1], 4, 7)), KvFailed("r", "why"), ReadsEnded("r")
    )  # fmt: skip
    it.start("s", [1])
    it.end_of("s")
    assert it.of("r") == []


def test_the_status_counts_what_was_done(rig: Any) -> None:
    it = rig()
    it.start("r", [1, 2])
    it.end_of("r")
    it.start("bad", [1] * 64)
    it.end_of("bad")
    it.until(lambda: it.outbox.counters[-1].output_tokens == 3)
    assert it.outbox.counters[-1].requests == 1
    assert it.outbox.usage.blocks == 64


def test_an_engine_that_fails_ends_the_loop_with_its_error() -> None:
    mailbox: Mailbox[Command] = Mailbox()
    pool = BlockPool(4, BLOCK)
    scheduler = Scheduler(Limits(max_num_seqs=4, max_batched_tokens=16, max_waiting=8, max_model_len=64), pool, [99], 1)
    loop = StepLoop(
        scheduler,
        pool,
        FakePipeline(),
        mailbox,
        FakeOutbox(),
        "tcp",
        "recompute",
        PUBLISHED,
        StepClock(),
        no_grammars(),
    )
    mailbox.put(Fail(RankLost("rank 1 of this engine was lost")))
    with pytest.raises(RankLost, match="rank 1 of this engine was lost"):
        loop.run()
    mailbox.close()

"""An engine around the scheduler, small enough to be obviously right: memory, runner, reads, leases.

A KV slot holds a digest of all tokens up to its position, and the next token is made from the digest in the slot before
it. So a wrong block table, a block that was given away too early or a read that came too late all show in the output.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from tandem.engine.step.rank_requests import RankRequests
from tandem.engine.step.step_message import StepEncoder
from tandem.errors import RequestError
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits
from tandem.scheduling.batch import Batch, Row, SampleAt, Sampled, StepResult, row_failed
from tandem.scheduling.events import (
    BlocksAllocated,
    ChunkComputed,
    Event,
    Finished,
    PrefillEnded,
    PullEnded,
    ShortOfBlocks,
    TokenOut,
)
from tandem.scheduling.request import RequestState
from tandem.scheduling.scheduler import Scheduler
from tandem.wire.messages import Address, Failed, Generate, Local, Prefill, PullKv
from tandem.wire.sampling import SamplingParams
from tests.scheduling.invariants import check_scheduler

VOCABULARY = 5
EOS = 0
GARBAGE = -1


def digest_after(digest: int, token: int) -> int:
    return (digest * 1_000_003 + token * 7919 + 12345) % (2**61 - 1)


def digests(tokens: list[int]) -> list[int]:
    values, digest = [], 1
    for token in tokens:
        digest = digest_after(digest, token)
        values.append(digest)
    return values


def next_token(digest: int, banned: list[int]) -> int:
    token = (digest >> 7) % VOCABULARY
    while token in banned:
        token = (token + 1) % VOCABULARY
    return token


def reference(tokens: list[int], prompt_len: int, params: SamplingParams, max_model_len: int) -> tuple[list[int], str]:
    """All output tokens that a request ends with, and its finish reason."""
    tokens = list(tokens)
    stop = [*params.stop_token_ids, *([] if params.ignore_eos else [EOS])]
    while True:
        early = len(tokens) - prompt_len < params.min_tokens
        tokens.append(next_token(digests(tokens)[-1], stop if early else []))
        if tokens[-1] in stop:
            return tokens[prompt_len:], "stop"
        if len(tokens) - prompt_len == params.max_tokens or len(tokens) == max_model_len:
            return tokens[prompt_len:], "length"


def pull(first_token: bool = True) -> PullKv:
    return PullKv("prefill-engine", "incarnation", Address("127.0.0.1", 1), "remote", first_token)


def generate(
    request_id: str,
    tokens: list[int],
    kv: Local | Prefill | PullKv | None = None,
    prompt_len: int | None = None,
    time_left: float = 1e9,
    **params: object,
) -> Generate:
    sampling = SamplingParams(**({"ignore_eos": True} | params))  # type: ignore[arg-type]
    return Generate(request_id, tokens, prompt_len or len(tokens), sampling, time_left, kv or Local())


@dataclass
class Record:
    """What came out for one request."""

    message: Generate
    outputs: dict[int, int] = field(default_factory=dict)
    finish_reason: str | None = None
    terminal: list[Finished | Failed] = field(default_factory=list)
    aborted: bool = False
    chunks: list[ChunkComputed] = field(default_factory=list)
    prefill_ended: list[PrefillEnded] = field(default_factory=list)
    pull_ended: list[PullEnded] = field(default_factory=list)
    allocated: BlocksAllocated | None = None

    @property
    def tokens(self) -> list[int]:
        return [self.outputs[index] for index in sorted(self.outputs)]


class FakeEngine:
    def __init__(
        self,
        num_blocks: int = 64,
        block_size: int = 4,
        pipeline_depth: int = 1,
        max_num_seqs: int = 8,
        max_batched_tokens: int = 16,
        max_waiting: int = 100,
        max_model_len: int = 64,
    ) -> None:
        self.limits = Limits(max_num_seqs, max_batched_tokens, max_waiting, max_model_len, VOCABULARY)
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.limits, self.pool, {EOS}, pipeline_depth)
        self.memory = [[GARBAGE] * block_size for _ in range(num_blocks)]
        self.batches: deque[Batch] = deque()
        self.steps = StepEncoder(max(1, self.limits.max_num_seqs - 1))
        self.follower = RankRequests(torch.device("cpu"), samples=True)
        self.records: dict[str, Record] = {}
        self.reads: dict[str, BlocksAllocated] = {}  # in progress: their bytes may come at any time
        self.leases: dict[str, PrefillEnded] = {}
        self.short_of_blocks = False
        self.broken: dict[str, RequestError] = {}  # requests whose rows cannot be sampled, and why
        self.now = 0.0
        self.events: list[Event] = []

    # --- commands ---

    def add(self, message: Generate) -> Record:
        self.scheduler.add(message, self.now)
        record = self.records[message.request_id] = Record(message)
        return record

    def schedule(self) -> Batch | None:
        batch = self.scheduler.schedule(self.now)
        self.settle()
        if batch is not None:
            self.check_batch(batch)
            self.batches.append(batch)
        return batch

    def apply(self) -> None:
        """Run the oldest batch only now, as late as can be, and hand its result in."""
        batch = self.batches.popleft()
        result = StepResult(batch.batch_id, [self.run_row(row) for row in batch.rows])
        self.scheduler.apply(result, self.now)
        self.settle()

    def step(self) -> Batch | None:
        self.now += 1.0
        batch = self.schedule()
        if batch is not None:
            self.apply()
        return batch

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        record = self.records.get(request_id)
        if record is not None and not record.terminal:
            record.aborted = True
        self.settle()

    def deliver(self, request_id: str, first_token: bool) -> None:
        """The peer's KV has come, completely."""
        allocated = self.reads.pop(request_id)
        message = self.records[request_id].message
        self.write(allocated, digests(message.token_ids))
        token = self.first_output(request_id) if first_token else None
        if token is not None:
            self.records[request_id].outputs[len(message.token_ids) - message.prompt_len] = token
        self.scheduler.kv_arrived(request_id, token, self.now)
        self.settle()

    def lose_kv(self, request_id: str, reading: bool, first_token: bool) -> None:
        message = self.records[request_id].message
        token = self.first_output(request_id) if first_token else None
        if token is not None:
            self.records[request_id].outputs[len(message.token_ids) - message.prompt_len] = token
        if not reading:
            self.reads.pop(request_id, None)
        self.scheduler.kv_failed(request_id, "the peer was lost", self.now, reading=reading, first_token=token)
        self.settle()

    def scribble(self, request_id: str) -> None:
        """Bytes of a read that is in progress come in: nobody may mind."""
        allocated = self.reads[request_id]
        self.write(allocated, [GARBAGE] * allocated.num_tokens)

    def end_read(self, request_id: str) -> None:
        del self.reads[request_id]
        self.scheduler.read_ended(request_id)
        self.settle()

    def end_lease(self, request_id: str) -> None:
        self.check_lease(request_id)
        self.pool.unlease(self.leases.pop(request_id).block_ids)

    def expire(self) -> None:
        self.scheduler.expire(self.now)
        self.settle()

    def run_until_done(self, max_steps: int = 2000) -> None:
        """Everything outside ends too: reads come, leases run out."""
        for _ in range(max_steps):
            self.now += 1.0
            batch = self.schedule()
            if self.batches:
                self.apply()
            for request_id in list(self.reads):
                request = self.scheduler.get(request_id)
                if request is not None and request.state is RequestState.WAITING_FOR_KV:
                    kv = self.records[request_id].message.kv
                    self.deliver(request_id, first_token=isinstance(kv, PullKv) and kv.first_token)
                else:
                    self.end_read(request_id)
            for request_id in list(self.leases):
                self.end_lease(request_id)
            counts = self.scheduler.counts()
            if batch is None and not self.batches and not (counts.waiting + counts.waiting_for_kv + counts.running):
                return
        raise AssertionError(f"requests hang: {self.scheduler.counts()}, {self.pool.usage()}")

    # --- the runner ---

    def run_row(self, row: Row) -> Sampled | None:
        slots = [(row.block_ids[place // self.pool.block_size], place % self.pool.block_size)
                 for place in range(row.start + len(row.tokens))]  # fmt: skip
        digest = 1
        if row.start:
            block, slot = slots[row.start - 1]
            digest = self.memory[block][slot]
        for place, token in enumerate(row.tokens, row.start):
            digest = digest_after(digest, token)
            block, slot = slots[place]
            self.memory[block][slot] = digest
        if row.sample is None:
            return None
        if row.request_id in self.broken:
            return row_failed(self.broken[row.request_id])
        return Sampled(next_token(digest, row.sample.banned_ids))

    def write(self, allocated: BlocksAllocated, values: list[int]) -> None:
        for place in range(allocated.num_cached_tokens, allocated.num_tokens):
            block = allocated.block_ids[place // self.pool.block_size]
            self.memory[block][place % self.pool.block_size] = values[place]

    def first_output(self, request_id: str) -> int:
        message = self.records[request_id].message
        outputs, _ = reference(message.token_ids, message.prompt_len, message.sampling, self.limits.max_model_len)
        return outputs[len(message.token_ids) - message.prompt_len]

    # --- what must hold ---

    def check_batch(self, batch: Batch) -> None:
        assert 0 < len(batch.rows) <= self.limits.max_num_seqs
        assert sum(len(row.tokens) for row in batch.rows) <= self.limits.max_batched_tokens
        assert len({row.request_id for row in batch.rows}) == len(batch.rows)
        for row in batch.rows:
            assert row.tokens
            assert len(row.block_ids) * self.pool.block_size >= row.start + len(row.tokens)
            assert len(set(row.block_ids)) == len(row.block_ids)
        self.follower.take(self.steps.step(batch))
        for row in batch.rows:
            assert self.follower[row.request_id].table.ids == row.block_ids
            if row.sample is not None:
                self.check_sample(row, row.sample)

    def check_sample(self, row: Row, sample: SampleAt) -> None:
        assert sample.position == row.start + len(row.tokens)
        assert sample.output_len == sample.position - self.records[row.request_id].message.prompt_len
        if row.history is not None:
            assert len(row.history) == sample.position

    def check_lease(self, request_id: str) -> None:
        """What was announced is still in place."""
        record = self.records[request_id]
        expected, table = digests(record.message.token_ids), self.leases[request_id].block_ids
        computed = record.chunks[-1].num_tokens if record.chunks else 0
        for place in range(computed):
            block, slot = table[place // self.pool.block_size], place % self.pool.block_size
            assert self.memory[block][slot] == expected[place]

    def settle(self) -> None:
        for event in self.scheduler.drain():
            if isinstance(event, ShortOfBlocks):
                assert event.short != self.short_of_blocks
                self.short_of_blocks = event.short
                continue
            self.events.append(event)
            record = self.records[event.request_id]
            allowed = (PrefillEnded, PullEnded) if record.aborted or record.terminal else ()
            assert not allowed or isinstance(event, allowed), f"{event} after the end"
            match event:
                case TokenOut():
                    assert record.outputs.setdefault(event.index, event.token_id) == event.token_id
                    record.finish_reason = event.finish_reason
                case Finished() | Failed():
                    record.terminal.append(event)
                case ChunkComputed():
                    self.check_chunk(record, event)
                case PrefillEnded():
                    record.prefill_ended.append(event)
                    if event.block_ids:
                        self.leases[event.request_id] = event
                case BlocksAllocated():
                    record.allocated = event
                    self.reads[event.request_id] = event
                case PullEnded():
                    record.pull_ended.append(event)
                    if not event.quarantined:
                        self.reads.pop(event.request_id, None)
        check_scheduler(self.scheduler)

    def check_chunk(self, record: Record, event: ChunkComputed) -> None:
        """Chunks join up, and what they announce can be read."""
        before = record.chunks[-1].num_tokens if record.chunks else 0
        assert event.first_block == before // self.pool.block_size
        assert len(event.block_ids) == self.pool.blocks_for(event.num_tokens) - event.first_block
        expected = digests(record.message.token_ids)
        for place in range(before, event.num_tokens):
            block = event.block_ids[place // self.pool.block_size - event.first_block]
            assert self.memory[block][place % self.pool.block_size] == expected[place]
        assert event.final == (event.token is not None) == (event.num_tokens == len(expected))
        record.chunks.append(event)

"""The scheduler under anything that can happen, with a runner whose output shows every mistake."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tandem.errors import EngineFailed, InvalidRequest, NoTokenLeft, Overloaded, RequestError
from tandem.scheduling.events import Finished
from tandem.scheduling.request import RequestState
from tandem.wire.messages import Generate, Local, Prefill, PullKv
from tandem.wire.sampling import SamplingParams
from tests.scheduling.fake_engine import FakeEngine, pull, reference
from tests.scheduling.invariants import check_scheduler

MAX_MODEL_LEN = 30


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.sampled_from([4, 7, 12, 40]),
        block_size=st.sampled_from([1, 2, 4]),
        depth=st.integers(1, 3),
        max_num_seqs=st.sampled_from([1, 2, 4]),
        max_batched_tokens=st.sampled_from([1, 3, 8, 64]),
    )
    def start(self, num_blocks: int, block_size: int, depth: int, max_num_seqs: int, max_batched_tokens: int) -> None:
        self.engine = FakeEngine(
            num_blocks, block_size, depth, max_num_seqs, max_batched_tokens, max_waiting=6, max_model_len=MAX_MODEL_LEN
        )
        self.count = 0

    def pick(self, data: st.DataObject, ids: object) -> str:
        return data.draw(st.sampled_from(sorted(ids)))  # type: ignore[call-overload,no-any-return]

    @rule(
        # Few distinct tokens and a common start, so that prefixes are shared.
        head=st.sampled_from([[], [1, 2, 3, 4], [1, 2, 3, 4, 1, 2, 3, 4]]),
        tail=st.lists(st.integers(1, 2), min_size=1, max_size=9),
        output=st.integers(0, 2),
        kv=st.sampled_from([Local(), Local(), Prefill(), pull(), pull(first_token=False)]),
        max_tokens=st.integers(1, 12),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        repetition_penalty=st.sampled_from([1.0, 1.1]),
        time_left=st.sampled_from([1e9, 1e9, 20.0]),
    )
    def add(
        self,
        head: list[int],
        tail: list[int],
        output: int,
        kv: Local | Prefill | PullKv,
        time_left: float,
        max_tokens: int,
        min_tokens: int,
        **params: object,
    ) -> None:
        tokens = head + tail
        params["min_tokens"] = min(min_tokens, max_tokens)
        prompt_len = max(1, len(tokens) - output)
        self.count += 1
        message = Generate(
            f"r{self.count}", tokens, prompt_len, SamplingParams(max_tokens, **params), time_left, kv  # type: ignore[arg-type]
        )  # fmt: skip
        try:
            self.engine.add(message)
        except InvalidRequest:
            room = self.engine.pool.num_blocks * self.engine.pool.block_size
            too_long = len(tokens) + isinstance(kv, PullKv) > room or len(tokens) + 1 > MAX_MODEL_LEN
            assert too_long or len(tokens) - prompt_len >= message.sampling.max_tokens
        except Overloaded:
            assert self.engine.scheduler.counts().waiting >= self.engine.limits.max_waiting

    @rule()
    def schedule(self) -> None:
        self.engine.now += 1.0
        self.engine.schedule()

    @precondition(lambda self: self.engine.batches)
    @rule()
    def apply(self) -> None:
        self.engine.apply()

    @rule(steps=st.integers(1, 6))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.engine.now += 1.0
            self.engine.schedule()
            if self.engine.batches:
                self.engine.apply()

    @precondition(lambda self: self.engine.records)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(self.pick(data, self.engine.records))

    @precondition(lambda self: self.waiting_for_kv())
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        request_id = self.pick(data, self.waiting_for_kv())
        kv = self.engine.records[request_id].message.kv
        assert isinstance(kv, PullKv)
        self.engine.deliver(request_id, first_token=kv.first_token)

    @precondition(lambda self: self.waiting_for_kv())
    @rule(data=st.data(), reading=st.booleans(), first_token=st.booleans())
    def lose_kv(self, data: st.DataObject, reading: bool, first_token: bool) -> None:
        self.engine.lose_kv(self.pick(data, self.waiting_for_kv()), reading, first_token)

    @precondition(lambda self: self.engine.reads)
    @rule(data=st.data())
    def scribble(self, data: st.DataObject) -> None:
        self.engine.scribble(self.pick(data, self.engine.reads))

    @precondition(lambda self: self.orphaned_reads())
    @rule(data=st.data())
    def end_read(self, data: st.DataObject) -> None:
        self.engine.end_read(self.pick(data, self.orphaned_reads()))

    @precondition(lambda self: self.engine.leases)
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        self.engine.end_lease(self.pick(data, self.engine.leases))

    @rule()
    def expire(self) -> None:
        self.engine.expire()

    @precondition(lambda self: self.engine.records)
    @rule(data=st.data(), error=st.sampled_from([EngineFailed("not numbers"), NoTokenLeft("nothing left")]))
    def break_sampling(self, data: st.DataObject, error: RequestError) -> None:
        self.engine.broken[self.pick(data, self.engine.records)] = error

    def waiting_for_kv(self) -> list[str]:
        found = ((request_id, self.engine.scheduler.get(request_id)) for request_id in self.engine.reads)
        return [request_id for request_id, request in found if request and request.state is RequestState.WAITING_FOR_KV]

    def orphaned_reads(self) -> list[str]:
        waiting = self.waiting_for_kv()
        return [request_id for request_id in self.engine.reads if request_id not in waiting]

    @invariant()
    def limits_hold(self) -> None:
        if not hasattr(self, "engine"):
            return
        check_scheduler(self.engine.scheduler)
        counts, limits = self.engine.scheduler.counts(), self.engine.limits
        assert counts.running <= limits.max_num_seqs
        assert counts.waiting_for_kv <= limits.max_num_seqs
        assert len(self.engine.batches) == len(self.engine.scheduler.in_flight) <= self.engine.scheduler.pipeline_depth
        usage = self.engine.scheduler.kv_usage()
        assert usage.free + usage.cached + usage.leased + usage.in_use == usage.blocks
        for request_id in self.engine.leases:
            self.engine.check_lease(request_id)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.engine.run_until_done()
        usage = self.engine.pool.usage()
        assert usage.free + usage.cached == usage.blocks
        for request_id, record in self.engine.records.items():
            assert len(record.terminal) == (0 if record.aborted else 1)
            assert len(record.prefill_ended) == isinstance(record.message.kv, Prefill)
            self.check_outputs(request_id)

    def check_outputs(self, request_id: str) -> None:
        record = self.engine.records[request_id]
        message = record.message
        expected, reason = reference(message.token_ids, message.prompt_len, message.sampling, MAX_MODEL_LEN)
        done = len(message.token_ids) - message.prompt_len
        for index, token in record.outputs.items():
            assert token == expected[index]
        if not record.terminal or not isinstance(record.terminal[0], Finished):
            return
        if isinstance(message.kv, Prefill):
            assert record.tokens == expected[done : done + 1]
            assert record.prefill_ended[0].ok
            assert record.terminal[0].finish_reason == (reason if len(expected) == done + 1 else None)
        else:
            assert record.tokens == expected[done:]
            assert record.terminal[0].finish_reason == record.finish_reason == reason


SchedulerMachine.TestCase.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase

"""The step loop with its scheduler and sampler: what frontends ask of an engine, and what peers bring."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import torch

from tandem.engine.mailbox import Mailbox
from tandem.engine.outbox import KvEvent, Outputs
from tandem.engine.step.sampler import sample
from tandem.engine.step.step_loop import StepLoop
from tandem.engine.step_clock import StepClock
from tandem.engine.step_commands import (
    AbortRequest,
    Command,
    KvArrived,
    KvFailed,
    LeasesEnded,
    ReadsEnded,
    Shutdown,
    StartRequest,
)
from tandem.errors import WireError
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits
from tandem.scheduling.batch import Batch, StepResult
from tandem.scheduling.events import BlocksAllocated, PrefillEnded, PullEnded
from tandem.scheduling.scheduler import Scheduler
from tandem.transfer.decode.pull import Pull
from tandem.wire.codec import Codec
from tandem.wire.engine_status import EngineCounters, KvUsage, RequestCounts
from tandem.wire.messages import (
    Abort,
    Address,
    Failed,
    Generate,
    KvTransferParams,
    Local,
    Output,
    Prefill,
    PullKv,
    ToEngine,
    ToFrontend,
    Tokens,
)
from tandem.wire.messages import Outputs as OutputsMessage
from tandem.wire.peer_messages import KvComputed
from tandem.wire.sampling import SamplingParams
from tests.fuzz.channel import Channel
from tests.fuzz.fakes import Clock, Defect, OwnErrors
from tests.fuzz.target import Target
from tests.scheduling.invariants import check_scheduler
from tests.support.grammars import no_grammars

VOCABULARY, MODEL_LEN, BLOCK = 32, 48, 4
REQUESTS = [f"r{number}" for number in range(12)]
SOURCE = PullKv("p0", "life", Address("127.0.0.1", 1), "r0")
KINDS: list[Local | Prefill | PullKv] = [Local(), Prefill(), Prefill(True), SOURCE]
REAL = [
    *(
        Generate(
            request, [1, 2, 3, 4, 5][:length], length, SamplingParams(max_tokens=length, temperature=heat), 60.0, kv
        )
        for request, length, heat, kv in zip(REQUESTS, [1, 4, 5] * 4, [0.0, 1.0] * 6, KINDS * 3, strict=True)
    ),
    Generate("r1", [1, 2, 3], 3, SamplingParams(8, 2, 0.7, 0.9, 5, 0.1, 1.1, 0.5, 0.5, 7, 3, {1: 5.0}, [2]), 60.0),
    *(Abort(request) for request in REQUESTS[:4]),
]
COMPUTED = [KvComputed("life", "r0", 0, [1], 4, True, token) for token in (0, 7, VOCABULARY - 1)]
NUMBERS = [0, 1, 5, VOCABULARY - 1, VOCABULARY, 2**31 - 1]


class Engine(Target):
    """Nothing ends the loop; what it asks of the model, the model can do; every request has one end and no blocks."""

    NAME = "engine"
    INPUTS = 300

    def __init__(self, rng: random.Random, clock: Clock, errors: OwnErrors) -> None:
        super().__init__(rng, clock, errors)
        self._channel = Channel(ToEngine, REAL, REQUESTS, NUMBERS, valid=0.4)
        self._computed = Channel(KvComputed, COMPUTED, REQUESTS, NUMBERS, valid=0.7)
        self._commands: list[Command] = []

    async def feed(self) -> None:
        """Collect: the step loop takes the commands between its steps, all in one run."""
        try:
            self.last = self._channel.data(self.rng)
            match _TO_ENGINE.decode(self.last):
                case Generate() as generate:
                    self._commands.append(StartRequest(0, generate))
                case Abort(request_id=request_id):
                    self._commands.append(AbortRequest(request_id))
        except WireError:
            pass

    async def end(self) -> None:
        pool = BlockPool(24, BLOCK)
        limits = Limits(4, 16, 8, MODEL_LEN, VOCABULARY)
        scheduler = Scheduler(limits, pool, [VOCABULARY - 1], self.rng.choice([1, 2]))
        mailbox: Mailbox[Command] = Mailbox()
        surroundings = _Surroundings(self, self._commands, self._computed, scheduler, pool, mailbox)
        policy: Any = self.rng.choice(["recompute", "retry", "fail"])
        published = KvTransferParams(do_remote_prefill=True, remote_engine_id="d0")
        clock, masks = StepClock(), no_grammars()
        loop = StepLoop(scheduler, pool, surroundings, mailbox, surroundings, "tcp", policy, published, clock, masks)
        loop.run()
        surroundings.check()
        mailbox.close()


class _Surroundings:
    """Ranks, event loop and peers of one step loop: its pipeline and its outbox."""

    def __init__(
        self,
        target: Engine,
        commands: list[Command],
        computed: Channel,
        scheduler: Scheduler,
        pool: BlockPool,
        mailbox: Mailbox[Command],
    ) -> None:
        self._target, self._rng = target, target.rng
        self._waiting = commands[::-1]
        self._computed = computed
        self._scheduler, self._pool, self._mailbox = scheduler, pool, mailbox
        self._results: list[StepResult] = []
        self._ends: Counter[str] = Counter()
        self._started: Counter[str] = Counter()
        self._aborted: Counter[str] = Counter()
        self._pulling: set[str] = set()
        self._idle = 0

    # --- the pipeline ----------------------------------------------------------------------------------------------

    def submit(self, batch: Batch) -> None:
        self._idle = 0
        for row in batch.rows:
            end = row.start + len(row.tokens)
            if not all(0 <= token < VOCABULARY for token in row.tokens):
                raise Defect(f"the model is given tokens that it does not know: {row.tokens}")
            if end > MODEL_LEN or end > len(row.block_ids) * BLOCK:
                raise Defect(f"positions up to {end} with {len(row.block_ids)} blocks")
        sampling = [row.sample for row in batch.rows if row.sample is not None]
        generator = torch.Generator().manual_seed(self._rng.randrange(2**31))
        logits = torch.randn(len(sampling), VOCABULARY, generator=generator) * 4
        sampled = iter(sample(logits, sampling))
        self._results.append(
            StepResult(batch.batch_id, [next(sampled) if row.sample is not None else None for row in batch.rows])
        )

    def results(self) -> list[StepResult]:
        """Also give the loop its next command: it asks for results once a step."""
        self._next()
        done, self._results = self._results, []
        return done

    def fileno(self) -> int | None:
        return None

    def _next(self) -> None:
        self._idle += 1
        if self._waiting:
            command = self._waiting.pop()
            if isinstance(command, StartRequest):
                request_id = command.generate.request_id
                if self._is_open(request_id):
                    return  # the event loop refuses ids in use
                self._ends[request_id] = self._started[request_id]
                self._started[request_id] += 1
            elif isinstance(command, AbortRequest):
                self._aborted[command.request_id] = self._started[command.request_id]
            self._target.last = command
            self._mailbox.put(command)
        elif self._idle > 8 and not self._pulling:
            self._mailbox.put(Shutdown("the end"))
        else:
            self._mailbox.put(AbortRequest("unknown"))

    # --- the outbox ------------------------------------------------------------------------------------------------

    def post_kv(self, events: list[KvEvent]) -> None:
        for event in events:
            match event:
                case PrefillEnded(request_id=request_id):
                    self._mailbox.put(LeasesEnded([request_id]))
                case BlocksAllocated():
                    self._pulling.add(event.request_id)
                    self._pull(event)
                case PullEnded(request_id=request_id):
                    self._pulling.discard(request_id)
                    self._mailbox.put(ReadsEnded(request_id))

    def _pull(self, event: BlocksAllocated) -> None:
        self._pulling.discard(event.request_id)
        pull = Pull(event.request_id, "r0", "p0", self._rng.random() < 0.7)
        pull.allocated(event.block_ids, event.num_cached_tokens, event.num_tokens)
        try:
            message: KvComputed = _COMPUTED.decode(self._computed.data(self._rng))
        except WireError:
            first_token = self._rng.choice([None, *range(VOCABULARY)])
            self._mailbox.put(KvFailed(event.request_id, "spoilt", first_token))
            self._mailbox.put(ReadsEnded(event.request_id))
            return
        # The decode side has checked all of it but the token, which is the prefill engine's to choose.
        pull.first_token, pull.final, pull.announced_tokens = message.first_token, True, event.num_tokens
        self._mailbox.put(KvArrived(pull))

    def post_outputs(self, outputs: Outputs) -> None:
        for items in outputs.values():
            _TO_FRONTEND.decode(_TO_FRONTEND.encode(OutputsMessage(items)))
            for item in items:
                self._count(item)

    def _count(self, item: Output) -> None:
        if isinstance(item, Failed) or (isinstance(item, Tokens) and item.done):
            self._ends[item.request_id] += 1
            if self._ends[item.request_id] > self._started[item.request_id]:
                raise Defect(f"{item.request_id} has ended twice")

    def post_status(self, kv: KvUsage, requests: RequestCounts, counters: EngineCounters) -> None:
        check_scheduler(self._scheduler)

    def _is_open(self, request_id: str) -> bool:
        return self._started[request_id] > max(self._ends[request_id], self._aborted[request_id])

    # --- the end ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        open_requests = [name for name in self._started if self._is_open(name)]
        if open_requests:
            raise Defect(f"requests without an end: {sorted(open_requests)}")
        usage = self._pool.usage()
        if usage.leased or usage.in_use or usage.quarantined:
            raise Defect(f"blocks that nobody gave back: {usage}")


_TO_ENGINE: Codec[ToEngine] = Codec(ToEngine)
_TO_FRONTEND: Codec[ToFrontend] = Codec(ToFrontend)
_COMPUTED: Codec[KvComputed] = Codec(KvComputed)

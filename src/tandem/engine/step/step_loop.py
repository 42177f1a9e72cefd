"""The step loop of an engine: schedule, run, apply, publish. Runs in the main thread of rank 0."""

from __future__ import annotations

import functools
import logging
import select
import time
from collections import defaultdict, deque
from dataclasses import asdict

import msgspec

from tandem.config import KvFailure
from tandem.engine.mailbox import Mailbox
from tandem.engine.outbox import KvEvent, Outbox, Outputs
from tandem.engine.step.held_requests import HeldRequests
from tandem.engine.step.masks import MaskMaker, constrained_rows
from tandem.engine.step.open_request import OpenRequest, token_message, undo_begin
from tandem.engine.step.pipeline import Pipeline
from tandem.engine.step_clock import StepClock
from tandem.engine.step_commands import (
    AbortRequest,
    Command,
    Drain,
    Fail,
    GrammarReady,
    KvArrived,
    KvCorrupt,
    KvFailed,
    LeasesEnded,
    ReadsEnded,
    Shutdown,
    StartRequest,
)
from tandem.errors import Draining, InvalidRequest, KvLost, KvRetry, RequestError
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import too_many
from tandem.scheduling.events import (
    BlocksAllocated,
    ChunkComputed,
    Event,
    Finished,
    PrefillEnded,
    PromptScored,
    PullEnded,
    ShortOfBlocks,
    TokenOut,
)
from tandem.scheduling.scheduler import Scheduler
from tandem.transfer.decode.pull import Pull
from tandem.wire.engine_status import EngineCounters, RequestCounts
from tandem.wire.fields import clip
from tandem.wire.grammar import Grammar
from tandem.wire.messages import Failed, KvTransferParams, Prefill, PromptScores, RequestStats, Tokens

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.25
STATUS_SECONDS = 0.1


class StepLoop:
    """Joins scheduler, ranks and event loop.

    Args:
        outbox: takes tokens, KV events and status to the event loop.
        published: transfer parameters for a foreign proxy, less the request's own part.
        clock: shows other threads how long the step that runs now has run.
        masks: makes those of structured answers; the pipeline's too.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        pool: BlockPool,
        pipeline: Pipeline,
        mailbox: Mailbox[Command],
        outbox: Outbox,
        transport: str,
        kv_failure: KvFailure,
        published: KvTransferParams,
        clock: StepClock,
        masks: MaskMaker,
    ) -> None:
        self._scheduler = scheduler
        self._pool = pool
        self._pipeline = pipeline
        self._mailbox = mailbox
        self._outbox = outbox
        self._transport = transport
        self._kv_failure = kv_failure
        self._published = published
        self._requests: dict[str, OpenRequest] = {}
        self._leased: dict[str, list[int]] = {}
        self._stopping: str | None = None
        self._drain_by: float | None = None
        self._kv_bytes = 0
        self._kv_descriptors = 0
        self._status_at = 0.0
        self._submitted: deque[float] = deque()
        self._clock = clock
        self._masks = masks
        self._held = HeldRequests()

    def run(self) -> str:
        """Serve until told to stop; return the reason. Raises EngineFailed."""
        wait = select.poll()
        wait.register(self._mailbox.fileno(), select.POLLIN)
        if (results := self._pipeline.fileno()) is not None:
            wait.register(results, select.POLLIN)
        while self._stopping is None:
            idle = self._step()
            self._clock.since = self._submitted[0] if self._submitted else None
            if idle:
                wait.poll(IDLE_SECONDS * 1000)
        return self._stopping

    def _step(self) -> bool:
        """Go once through everything there is to do. Return whether that was all until something comes in."""
        now = time.monotonic()
        self._clock.since = self._submitted[0] if self._submitted else now  # also what is no batch may hang
        for command in self._mailbox.take():
            self._handle(command)
        now = time.monotonic()
        self._scheduler.expire(now)
        batch = self._scheduler.schedule(now)
        if batch is not None:
            self._submitted.append(now)
            self._masks.begin(batch.batch_id, constrained_rows(batch, self._scheduler))
            self._pipeline.submit(batch)
        results = self._pipeline.results()
        for result in results:
            self._scheduler.apply(result, time.monotonic())
            self._submitted.popleft()
            self._masks.drop(result.batch_id)
        self._publish(self._scheduler.drain())
        self._end_drain(now)
        idle = batch is None and not results  # what was applied may be what the next batch waits for
        self._post_status(time.monotonic(), idle=idle)
        return idle

    # --- what comes in -------------------------------------------------------------------------------------------

    def _handle(self, command: Command) -> None:
        now, scheduler = time.monotonic(), self._scheduler
        if self._held.takes(command):
            return
        match command:
            case StartRequest():
                self._begin(command, now)
            case GrammarReady():
                self._release(command, now)
            case AbortRequest(request_id=request_id):
                self._forget(request_id)
                scheduler.abort(request_id)
            case KvArrived(pull=pull):
                self._arrived(pull, now)
            case KvFailed():
                self._kv_failed(command, now)
            case ReadsEnded(request_id=request_id):
                scheduler.read_ended(request_id)
            case KvCorrupt(request_ids=request_ids):
                for request_id in request_ids:
                    self._pool.forget(self._blocks_of(request_id))
            case LeasesEnded(request_ids=request_ids):
                for request_id in request_ids:
                    self._pool.unlease(self._leased.pop(request_id, []))
            case Drain(by=by):
                self._drain_by = by if self._drain_by is None else min(by, self._drain_by)
            case Fail(error=error):
                raise error
            case Shutdown(reason=reason):
                self._stopping = reason

    def _begin(self, command: StartRequest, now: float) -> None:
        """Start a request, once its grammar is compiled: no step shall wait for that."""
        request_id, grammar = command.generate.request_id, command.generate.grammar
        refusal = self._refusal(grammar)
        if refusal is not None or grammar is None or request_id in self._held:
            return self._start(command, now, refusal)
        if self._masks.prepare(grammar, functools.partial(self._compiled, request_id, now)):
            return self._start(command, now)
        self._held.hold(command, now)

    def _refusal(self, grammar: Grammar | None) -> RequestError | None:
        """Return why no request, or none with this grammar, can begin now."""
        if self._drain_by is not None:
            return Draining("this engine is about to end and takes no new requests", retry_after=1)
        full = grammar is not None and self._counts().waiting >= self._scheduler.limits.max_waiting
        return too_many(self._scheduler.limits) if full else None

    def _compiled(self, request_id: str, since: float, error: RequestError | None) -> None:
        """Called in the thread that compiles."""
        self._mailbox.put(GrammarReady(request_id, since, error))

    def _release(self, ready: GrammarReady, now: float) -> None:
        released = self._held.release(ready, now)
        if released is None:
            return
        start, later = released
        self._start(start, now, ready.error)
        for command in later:
            self._handle(command)

    def _start(self, command: StartRequest, now: float, error: RequestError | None = None) -> None:
        """Hand a request to the scheduler. `error`: why that cannot be."""
        frontend, generate = command.frontend, command.generate
        request_id = generate.request_id
        try:
            if request_id in self._held:
                text = f"request id {request_id} is in use; every request needs its own"
                raise InvalidRequest(text, param="request_id")
            if error is not None:
                raise error
            self._scheduler.add(generate, now)
        except RequestError as error:
            log.info("request %s refused: %s", request_id, error)
            failed = Failed(request_id, error.code, str(error), error.param, error.retry_after)
            self._post({frontend: [failed]}, undo_begin(generate))
            return
        self._requests[request_id] = OpenRequest(frontend, isinstance(generate.kv, Prefill) and generate.kv.published)
        log.debug("request %s: %d tokens", request_id, len(generate.token_ids))

    def _arrived(self, pull: Pull, now: float) -> None:
        self._kv_bytes += pull.bytes
        self._kv_descriptors += pull.descriptors
        request = self._requests.get(pull.request_id)
        if request is not None:
            request.pull = pull
        self._scheduler.kv_arrived(pull.request_id, pull.first_token if pull.first_token_expected else None, now)

    def _kv_failed(self, command: KvFailed, now: float) -> None:
        request_id, reason, first_token = command.request_id, command.reason, command.first_token
        text = clip(f"the prompt's KV could not be had: {reason}")
        match self._kv_failure:
            case "recompute":
                self._scheduler.kv_failed(request_id, reason, now, reading=True, first_token=first_token)
            case "retry":
                self._scheduler.fail(request_id, KvRetry(text, retry_after=1), now)
            case "fail":
                self._scheduler.fail(request_id, KvLost(text), now)

    def _end_drain(self, now: float) -> None:
        """End if the engine drains and nobody needs it any more, or its time is over."""
        if self._drain_by is None:
            return
        if not self._requests and not self._leased and not self._held:
            self._stopping = "it was drained"
        elif now >= self._drain_by:
            requests, leases = len(self._requests) + len(self._held), len(self._leased)
            self._stopping = f"it was told to, with {requests} requests and {leases} leases left"

    # --- what goes out -------------------------------------------------------------------------------------------

    def _publish(self, events: list[Event]) -> None:
        """Post tokens for the frontends and KV events; one call of each for all that a step has."""
        if not events:
            return
        outputs: Outputs = defaultdict(list)
        kv_events: list[KvEvent] = []
        last: dict[str, TokenOut] = {}
        for event in events:
            match event:
                case TokenOut(request_id=request_id):
                    if (waiting := last.pop(request_id, None)) is not None:
                        self._add_token(outputs, waiting, None)
                    last[request_id] = event
                case PromptScored(request_id=request_id):
                    if (open_request := self._requests.get(request_id)) is not None:
                        outputs[open_request.frontend].append(PromptScores(request_id, event.start, event.logprobs))
                case Finished(request_id=request_id):
                    self._finish(outputs, event, last.pop(request_id, None))
                case Failed(request_id=request_id):
                    request = self._forget(request_id)
                    if request is not None:
                        outputs[request.frontend].append(event)
                case PrefillEnded(request_id=request_id, block_ids=blocks):
                    self._leased[request_id] = blocks
                    kv_events.append(event)
                case ChunkComputed() | BlocksAllocated() | PullEnded() | ShortOfBlocks():
                    kv_events.append(event)
        for token in last.values():
            self._add_token(outputs, token, None)
        self._post(outputs, kv_events)

    def _post(self, outputs: Outputs, kv_events: list[KvEvent]) -> None:
        if kv_events:  # first: a decode engine should hear that a chunk is there before anybody hears of the token
            self._outbox.post_kv(kv_events)
        if outputs:
            self._outbox.post_outputs(outputs)

    def _add_token(self, outputs: Outputs, event: TokenOut, finished: RequestStats | None) -> None:
        """Add a token, with the first and the last one how it was made. `finished`: this engine's part is done."""
        request = self._requests.get(event.request_id)
        if request is None:
            return
        stats = finished
        if request.first_out_at is None:
            request.first_out_at = time.monotonic()
            if stats is None and (scheduled := self._scheduler.get(event.request_id)) is not None:
                stats = request.with_transfer(scheduled.stats(request.first_out_at), self._pool, self._transport)
        params = self._transfer_params(event.request_id) if finished is not None and request.publish else None
        outputs[request.frontend].append(token_message(event, stats, params, done=finished is not None))

    def _finish(self, outputs: Outputs, event: Finished, token: TokenOut | None) -> None:
        request = self._requests.get(event.request_id)
        if request is None:
            return
        stats = request.with_transfer(event.stats, self._pool, self._transport)
        if token is not None:
            self._add_token(outputs, token, stats)
        else:
            end = Tokens(event.request_id, 0, [], finish_reason=event.finish_reason, done=True, stats=stats)
            outputs[request.frontend].append(end)
        self._forget(event.request_id)
        log.debug("request %s finished: %s", event.request_id, event.finish_reason)

    def _forget(self, request_id: str) -> OpenRequest | None:
        self._masks.forget(request_id)
        return self._requests.pop(request_id, None)

    def _transfer_params(self, request_id: str) -> KvTransferParams:
        blocks = self._blocks_of(request_id)
        return msgspec.structs.replace(self._published, remote_request_id=request_id, remote_block_ids=blocks)

    def _blocks_of(self, request_id: str) -> list[int]:
        scheduled = self._scheduler.get(request_id)
        return self._leased.get(request_id) or (list(scheduled.block_ids) if scheduled else [])

    # --- status --------------------------------------------------------------------------------------------------

    def _post_status(self, now: float, *, idle: bool) -> None:
        """Post what others may know of the scheduler, which belongs to this thread; while steps run, now and then."""
        if not idle and now - self._status_at < STATUS_SECONDS:
            return
        counters = EngineCounters(
            **asdict(self._scheduler.totals), kv_bytes=self._kv_bytes, kv_descriptors=self._kv_descriptors
        )
        self._status_at = now
        self._outbox.post_status(self._scheduler.kv_usage(), self._counts(), counters)

    def _counts(self) -> RequestCounts:
        counts = self._scheduler.counts()
        return msgspec.structs.replace(counts, waiting=counts.waiting + len(self._held))

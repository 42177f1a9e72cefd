"""The scheduler decides which requests run, with which blocks, and what becomes of their tokens.

Pure: no tensors, sockets, threads or clocks. The caller passes the time, runs what `schedule` returns and hands the
results to `apply` in the same order. Whatever the caller must act on comes out of `drain`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from tandem.errors import EngineFailed, InvalidRequest, RequestError, TimedOut, WireError, request_error
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits, new_request, too_many
from tandem.scheduling.batch import Batch, RowError, Sampled, StepResult
from tandem.scheduling.batch_builder import BatchBuilder, BatchEntry
from tandem.scheduling.events import ChunkComputed, Event, FinishReason, PromptScored, TokenOut
from tandem.scheduling.preemption import recompute
from tandem.scheduling.request import Request, RequestState
from tandem.scheduling.state import SchedulerState, Totals
from tandem.wire.engine_status import KvUsage, RequestCounts
from tandem.wire.messages import Generate, Prefill, PullKv, TokenLogprobs

_NO_TOKEN = RowError(EngineFailed.code, "no token came back from the engine's step")


@dataclass(frozen=True, slots=True)
class InFlight:
    """A batch whose result has not come."""

    batch_id: int
    entries: list[BatchEntry]


class Scheduler:
    """Schedules all requests of one engine.

    Args:
        limits: bounds on batches and requests.
        pool: its KV blocks. The caller shares it to end leases (`BlockPool.unlease`), and for nothing else.
        eos_ids: the model's end-of-sequence tokens.
        pipeline_depth: most batches in flight. A request's tokens count as computed when they are scheduled, so that
            its next chunk can follow before the last one is back.

    Attributes:
        state: the requests; to look at, not to change.
        in_flight: batches whose results have not come, oldest first.
    """

    def __init__(self, limits: Limits, pool: BlockPool, eos_ids: Iterable[int], pipeline_depth: int = 1) -> None:
        if pipeline_depth < 1:
            raise ValueError(f"pipeline_depth must be at least 1; got {pipeline_depth}")
        self.limits = limits
        self.pool = pool
        self.pipeline_depth = pipeline_depth
        self._eos_ids = frozenset(eos_ids)
        self.state = SchedulerState(limits, pool)
        self.in_flight: deque[InFlight] = deque()
        self._deadlines: list[tuple[float, int, str]] = []
        self._next_batch_id = 0
        self._next_order = 0

    # --- new requests ----------------------------------------------------------------------------------------------

    def add(self, message: Generate, now: float) -> None:
        """Queue a request. Raises InvalidRequest or Overloaded; the request is then unknown here."""
        state, request_id = self.state, message.request_id
        if request_id in state.requests or request_id in state.quarantined:
            raise InvalidRequest(f"request id {request_id} is in use; every request needs its own", param="request_id")
        request = new_request(message, self.limits, self.pool, self._eos_ids, self._next_order, now)
        if len(state.waiting_local) + len(state.waiting_pull) >= self.limits.max_waiting:
            raise too_many(self.limits)
        self._next_order += 1
        state.totals.requests += 1
        state.requests[request_id] = request
        state.enter(request, RequestState.WAITING)
        heappush(self._deadlines, (request.deadline, request.order, request_id))

    # --- steps -----------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch | None:
        """Return the next batch, or None: nothing can be computed now, or `pipeline_depth` batches are in flight.

        After None it is worth asking again when anything has changed: a request, a result, KV, a lease.
        """
        if len(self.in_flight) >= self.pipeline_depth:
            return None
        entries = BatchBuilder(self.state, self.pipeline_depth, now).build()
        if not entries:
            return None
        batch_id = self._next_batch_id
        self._next_batch_id += 1
        self.in_flight.append(InFlight(batch_id, entries))
        return Batch(batch_id, [entry.request.row(entry.end - entry.count, entry.count) for entry in entries])

    def apply(self, result: StepResult, now: float) -> None:
        """Apply the result of the oldest batch in flight. Raises WireError for the result of another batch."""
        expected = self.in_flight[0] if self.in_flight else None
        if expected is None or result.batch_id != expected.batch_id:
            raise WireError(
                f"the result of batch {result.batch_id} came, expected was "
                f"{'none' if expected is None else f'that of batch {expected.batch_id}'}"
            )
        if len(result.sampled) != len(expected.entries):
            raise WireError(
                f"batch {result.batch_id} has {len(expected.entries)} rows, its result {len(result.sampled)}"
            )
        self.in_flight.popleft()
        self.state.totals.steps += 1
        for index, (entry, sampled) in enumerate(zip(expected.entries, result.sampled, strict=True)):
            entry.request.inflight -= 1
            if entry.request.state is not RequestState.FINISHED:
                self._note_scores(entry, result.scores.get(index, []))
                self._apply_row(entry, sampled, now)
            elif not entry.request.inflight:
                self.state.release_blocks(entry.request)

    def drain(self) -> list[Event]:
        """Return and forget all events since the last call, in order."""
        events, self.state.events = self.state.events, []
        return events

    # --- KV from a peer --------------------------------------------------------------------------------------------

    def kv_arrived(self, request_id: str, first_token: int | None, now: float) -> None:
        """Let a PullKv request run: its KV is in its blocks and no read is in progress. Unknown ids are fine.

        Args:
            first_token: what the prefill engine sampled (and sent to the client itself). None: this engine computes
                the last token of the prompt once more and samples.
        """
        request = self.get(request_id)
        if request is None or request.state is not RequestState.WAITING_FOR_KV:
            return
        length = len(request.tokens)
        if first_token is None and request.num_cached == length:
            # To compute the last token would write into a block that others share.
            self.kv_failed(request_id, "the peer sent no first token", now, reading=False)
            return
        vocabulary = self.limits.vocab_size
        if first_token is not None and first_token >= vocabulary:
            # One bad id would fail the whole batch in the embedding, and the engine with it.
            reason = f"the peer's first token is {first_token}; this model has {vocabulary} tokens"
            self.kv_failed(request_id, reason, now, reading=False)
            return
        request.kv_arrived_at = now
        request.num_scored = request.prompt_len - 1  # the prefill engine's affair, which has computed the prompt
        request.num_computed = length if first_token is not None else length - 1
        self._publish(request, request.num_computed)
        self.state.move(request, RequestState.WAITING_FOR_SLOT)
        if first_token is not None:
            self._adopt_first_token(request, first_token, now)

    def kv_failed(
        self, request_id: str, reason: str, now: float, *, reading: bool, first_token: int | None = None
    ) -> None:
        """Compute a PullKv request here, as its KV will not come. Unknown ids are fine.

        Args:
            reading: reads into its blocks are in progress: those stay out of the pool until `read_ended`.
            first_token: what the prefill engine sampled, if that is known; else this engine samples it again.
        """
        request = self.get(request_id)
        if request is None or not isinstance(request.kv, PullKv):
            return
        if request.state not in (RequestState.WAITING, RequestState.WAITING_FOR_KV):
            return
        if reading:
            self.state.quarantine_reads(request)
        recompute(self.state, request, reason)
        if first_token is not None:
            self._adopt_first_token(request, first_token, now)

    def read_ended(self, request_id: str) -> None:
        """Free quarantined blocks: no read for this request is in progress any more. Unknown ids are fine."""
        self.pool.unquarantine(self.state.quarantined.pop(request_id, []))

    # --- ends ------------------------------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        """Forget a request; no terminal event follows. Idempotent. Blocks in flight go back when the batch is back."""
        request = self.get(request_id)
        if request is not None:
            self.state.end(request)

    def fail(self, request_id: str, error: RequestError, now: float) -> None:
        """End a request with an error. Unknown ids are fine."""
        request = self.get(request_id)
        if request is not None:
            self.state.fail(request, error, now)

    def expire(self, now: float) -> None:
        """Fail the requests whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, request_id = heappop(self._deadlines)
            request = self.get(request_id)
            if request is not None and request.order == order:
                error = TimedOut(
                    f"the request did not end within {now - request.arrived_at:.1f} s: it was {request.state.value} "
                    f"with {request.output_len} output tokens"
                )
                self.state.fail(request, error, now)

    # --- state -----------------------------------------------------------------------------------------------------

    @property
    def totals(self) -> Totals:
        return self.state.totals

    def get(self, request_id: str) -> Request | None:
        """Return the request of this id if it has not ended; to look at, not to change."""
        return self.state.requests.get(request_id)

    def counts(self) -> RequestCounts:
        state = self.state
        return RequestCounts(
            waiting=len(state.waiting_local) + len(state.waiting_pull) + len(state.waiting_for_slot),
            waiting_for_kv=len(state.waiting_for_kv),
            running=len(state.running),
        )

    def kv_usage(self) -> KvUsage:
        """Return the number of blocks by state; quarantined ones count as in use."""
        usage = self.pool.usage()
        return KvUsage(
            block_size=self.pool.block_size,
            blocks=usage.blocks,
            free=usage.free,
            cached=usage.cached,
            leased=usage.leased,
            in_use=usage.in_use + usage.quarantined,
        )

    # --- internals -------------------------------------------------------------------------------------------------

    def _apply_row(self, entry: BatchEntry, sampled: Sampled | None, now: float) -> None:
        request = entry.request
        error = sampled.error if sampled is not None else _NO_TOKEN if entry.samples else None
        if error is not None:
            if error.code == EngineFailed.code:
                # Whatever made the logits unusable may be in its KV already: no other request may find that.
                self.pool.forget(request.block_ids)
            self.state.fail(request, request_error(error.code, error.message), now)
            return
        self._publish(request, entry.end)
        if entry.samples and sampled is not None:
            reason = self._append(request, sampled, now)
            if isinstance(request.kv, Prefill):
                self._announce(request, entry.end, sampled.token_id)
                request.prefilled = True
                self.state.finish(request, reason, now)
            elif reason is not None:
                self.state.finish(request, reason, now)
        elif isinstance(request.kv, Prefill):
            self._announce(request, entry.end, None)

    def _note_scores(self, entry: BatchEntry, scores: list[TokenLogprobs]) -> None:
        """Pass on the log-probabilities that are new: what was preempted computes its prompt again."""
        request, start = entry.request, entry.end - entry.count + 1
        if new := scores[max(0, request.num_scored + 1 - start) :]:
            self.state.events.append(PromptScored(request.request_id, request.num_scored + 1, new))
            request.num_scored += len(new)

    def _append(self, request: Request, sampled: Sampled, now: float) -> FinishReason | None:
        index, token, before = request.output_len, sampled.token_id, request.digest
        request.append(token)
        reason = request.finish_reason()
        if request.first_token_at is None:
            request.first_token_at = now
        self.state.totals.output_tokens += 1
        self.state.events.append(TokenOut(request.request_id, index, token, sampled.logprobs, reason, before))
        return reason

    def _adopt_first_token(self, request: Request, token: int, now: float) -> None:
        """Append a token that the prefill engine sent to the client; it is sent again only if it is the last one."""
        index, before = request.output_len, request.digest
        request.append(token)
        request.first_token_at = now
        request.num_scored = request.prompt_len - 1
        reason = request.finish_reason()
        if reason is not None:
            self.state.events.append(TokenOut(request.request_id, index, token, None, reason, before))
            self.state.finish(request, reason, now)

    def _announce(self, request: Request, end: int, token: int | None) -> None:
        first = request.num_announced // self.pool.block_size
        blocks = request.block_ids[first : self.pool.blocks_for(end)]
        request.num_announced = end
        self.state.events.append(ChunkComputed(request.request_id, first, blocks, end, token is not None, token))

    def _publish(self, request: Request, end: int) -> None:
        """Offer the full blocks among the first `end` tokens to the prefix cache."""
        full = end // self.pool.block_size
        for index in range(request.num_published, full):
            self.pool.publish(request.block_ids[index], request.chain.digest(index))
        request.num_published = max(request.num_published, full)

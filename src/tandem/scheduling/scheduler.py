"""The scheduler: which requests run, with which blocks, and what becomes of their tokens.

Pure: no tensors, sockets, threads or clocks. The caller passes the time, runs what `schedule` returns and hands the
results to `apply` in the same order. Whatever the caller must act on comes out of `drain`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from heapq import heappop, heappush

from tandem.errors import EngineFailed, InvalidRequest, Overloaded, RequestError, TimedOut, WireError
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits, new_request
from tandem.scheduling.batch import Batch, Sampled, StepResult
from tandem.scheduling.batch_builder import BatchBuilder, BatchEntry
from tandem.scheduling.events import ChunkComputed, Event, FinishReason, TokenOut
from tandem.scheduling.request import Request, RequestState
from tandem.scheduling.state import SchedulerState, Totals
from tandem.wire.messages import Generate, KvUsage, Prefill, PullKv, RequestCounts

_RETRY_AFTER = 1  # seconds


@dataclass(frozen=True, slots=True)
class _InFlight:
    batch_id: int
    entries: list[BatchEntry]


class Scheduler:
    """All requests of one engine.

    Args:
        limits: what the engine takes on.
        pool: its KV blocks. The caller shares it to end leases (`BlockPool.unlease`), and for nothing else.
        eos_ids: the model's end-of-sequence tokens.
        pipeline_depth: how many batches may be in flight. A request's tokens count as computed when they are
            scheduled, so that its next chunk can follow before the last one is back.
    """

    def __init__(self, limits: Limits, pool: BlockPool, eos_ids: Iterable[int], pipeline_depth: int = 1) -> None:
        if pipeline_depth < 1:
            raise ValueError(f"pipeline_depth must be at least 1; got {pipeline_depth}")
        self.limits = limits
        self.pool = pool
        self.pipeline_depth = pipeline_depth
        self._eos_ids = frozenset(eos_ids)
        self._board = SchedulerState(limits, pool)
        self._in_flight: deque[_InFlight] = deque()
        self._deadlines: list[tuple[float, int, str]] = []
        self._next_batch_id = 0
        self._next_order = 0

    # --- requests come ---------------------------------------------------------------------------------------------

    def add(self, message: Generate, now: float) -> None:
        """Queue a request. Raises InvalidRequest or Overloaded, and then knows nothing of it."""
        board, request_id = self._board, message.request_id
        if request_id in board.requests or request_id in board.quarantined:
            raise InvalidRequest(f"request id {request_id} is in use; every request needs its own", param="request_id")
        request = new_request(message, self.limits, self.pool, self._eos_ids, self._next_order, now)
        if len(board.local) + len(board.pulls) >= self.limits.max_waiting:
            raise Overloaded(
                f"{self.limits.max_waiting} requests are waiting already; try again later", retry_after=_RETRY_AFTER
            )
        self._next_order += 1
        board.totals.requests += 1
        board.requests[request_id] = request
        board.enter(request, RequestState.WAITING)
        heappush(self._deadlines, (request.deadline, request.order, request_id))

    # --- steps -----------------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> Batch | None:
        """The next batch, or None: nothing can be computed now, or `pipeline_depth` batches are in flight.

        After None it is worth asking again when anything has changed: a request, a result, KV, a lease.
        """
        if len(self._in_flight) >= self.pipeline_depth:
            return None
        entries = BatchBuilder(self._board, self.pipeline_depth, now).pack()
        if not entries:
            return None
        batch_id = self._next_batch_id
        self._next_batch_id += 1
        self._in_flight.append(_InFlight(batch_id, entries))
        return Batch(batch_id, [entry.request.row(entry.end - entry.count, entry.count) for entry in entries])

    def apply(self, result: StepResult, now: float) -> None:
        """Take in what a batch computed; results come in the order of their batches. Raises WireError for another's."""
        expected = self._in_flight[0] if self._in_flight else None
        if expected is None or result.batch_id != expected.batch_id:
            raise WireError(
                f"the result of batch {result.batch_id} came, expected was "
                f"{'none' if expected is None else f'that of batch {expected.batch_id}'}"
            )
        if len(result.sampled) != len(expected.entries):
            raise WireError(
                f"batch {result.batch_id} has {len(expected.entries)} rows, its result {len(result.sampled)}"
            )
        self._in_flight.popleft()
        self._board.totals.steps += 1
        for entry, sampled in zip(expected.entries, result.sampled, strict=True):
            entry.request.inflight -= 1
            if entry.request.state is not RequestState.FINISHED:
                self._apply_row(entry, sampled, now)
            elif not entry.request.inflight:
                self._board.give_back(entry.request)

    def drain(self) -> list[Event]:
        """Everything that happened since the last call, in order."""
        events, self._board.events = self._board.events, []
        return events

    # --- KV from a peer --------------------------------------------------------------------------------------------

    def kv_arrived(self, request_id: str, first_token: int | None, now: float) -> None:
        """The KV of a PullKv request is in its blocks, and no read is in progress. Unknown ids are fine.

        Args:
            first_token: what the prefill engine sampled (and sent to the client itself). None: this engine computes
                the last token of the prompt once more and samples.
        """
        request = self._loading(request_id)
        if request is None:
            return
        length = len(request.tokens)
        if first_token is None and request.num_cached == length:
            # To compute the last token would write into a block that others share.
            self.kv_failed(request_id, "the peer sent no first token", now, reading=False)
            return
        request.kv_arrived_at = now
        request.num_computed = length if first_token is not None else length - 1
        self._publish(request, request.num_computed)
        self._board.move(request, RequestState.WAITING_FOR_SLOT)
        if first_token is not None:
            self._adopt_first_token(request, first_token, now)

    def kv_failed(
        self, request_id: str, reason: str, now: float, *, reading: bool, first_token: int | None = None
    ) -> None:
        """The KV of a PullKv request will not come: compute it here. Unknown ids are fine.

        Args:
            reading: reads into its blocks are in progress: those stay out of the pool until `read_ended`.
            first_token: what the prefill engine sampled, if that is known; else this engine samples it again.
        """
        request = self._board.requests.get(request_id)
        if request is None or not isinstance(request.kv, PullKv):
            return
        if request.state not in (RequestState.WAITING, RequestState.WAITING_FOR_KV):
            return
        self._board.give_up_pull(request, reason, reading)
        if first_token is not None:
            self._adopt_first_token(request, first_token, now)

    def read_ended(self, request_id: str) -> None:
        """No read for this request is in progress any more: quarantined blocks go back. Unknown ids are fine."""
        self.pool.unquarantine(self._board.quarantined.pop(request_id, []))

    # --- requests go -----------------------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        """Forget a request; no terminal event follows. Idempotent. Blocks in flight go back when the batch is back."""
        request = self._board.requests.get(request_id)
        if request is not None:
            self._board.drop(request)

    def fail(self, request_id: str, error: RequestError, now: float) -> None:
        """End a request with an error. Unknown ids are fine."""
        request = self._board.requests.get(request_id)
        if request is not None:
            self._board.fail(request, error, now)

    def expire(self, now: float) -> None:
        """Fail the requests whose deadline has come."""
        while self._deadlines and self._deadlines[0][0] <= now:
            _, order, request_id = heappop(self._deadlines)
            request = self._board.requests.get(request_id)
            if request is not None and request.order == order:
                state = request.state.value.replace("_", " ")
                self._board.fail(
                    request,
                    TimedOut(
                        f"the request did not end within {now - request.arrived_at:.1f} s: it was {state} "
                        f"with {request.output_len} output tokens"
                    ),
                    now,
                )

    # --- how it stands ---------------------------------------------------------------------------------------------

    @property
    def in_flight(self) -> int:
        """How many batches are out."""
        return len(self._in_flight)

    @property
    def totals(self) -> Totals:
        return self._board.totals

    def get(self, request_id: str) -> Request | None:
        """The living request of this id; to look at, not to change."""
        return self._board.requests.get(request_id)

    def counts(self) -> RequestCounts:
        board = self._board
        return RequestCounts(
            waiting=len(board.local) + len(board.pulls) + len(board.ready),
            waiting_for_kv=len(board.loading),
            running=len(board.running),
        )

    def kv_usage(self) -> KvUsage:
        """Blocks by state; quarantined ones count as in use."""
        usage = self.pool.usage()
        return KvUsage(
            block_size=self.pool.block_size,
            blocks=usage.blocks,
            free=usage.free,
            cached=usage.cached,
            leased=usage.leased,
            in_use=usage.in_use + usage.quarantined,
        )

    def check(self) -> None:
        """Raise AssertionError if requests, lanes and blocks contradict each other. For tests; O(everything)."""
        self.pool.check()
        board = self._board
        in_lanes = [
            request
            for lane in (board.local, board.pulls, board.loading, board.ready, board.running)
            for request in lane
        ]
        assert sorted(in_lanes, key=id) == sorted(board.requests.values(), key=id), "a request is lost"
        rows = Counter(entry.request.order for batch in self._in_flight for entry in batch.entries)
        ending = {
            entry.request.order: entry.request
            for batch in self._in_flight
            for entry in batch.entries
            if entry.request.state is RequestState.FINISHED
        }
        held: Counter[int] = Counter()
        for request in [*in_lanes, *ending.values()]:
            held.update(request.block_ids)
            assert request.inflight == rows[request.order], "inflight does not count the batches in flight"
            assert request.num_computed <= len(request.tokens), "more is computed than there is"
            if request.state is RequestState.WAITING:
                assert not request.block_ids, "a waiting request holds blocks"
                assert not request.inflight, "a waiting request is in flight"
            else:
                covered = len(request.block_ids) * self.pool.block_size
                assert request.num_computed <= covered, "a block table does not cover what is computed"
        for block in range(self.pool.num_blocks):
            assert held[block] + self.pool.leases(block) == self.pool.references(block), f"block {block} has leaked"

    # --- inside ----------------------------------------------------------------------------------------------------

    def _loading(self, request_id: str) -> Request | None:
        request = self._board.requests.get(request_id)
        return request if request is not None and request.state is RequestState.WAITING_FOR_KV else None

    def _apply_row(self, entry: BatchEntry, sampled: Sampled | None, now: float) -> None:
        request = entry.request
        error = "no token came back for it" if sampled is None else sampled.error
        if entry.samples and error is not None:
            # Whatever made the logits unusable may be in its KV already: nobody else shall find that.
            self.pool.forget(request.block_ids)
            self._board.fail(request, EngineFailed(f"the next token could not be sampled: {error}"), now)
            return
        self._publish(request, entry.end)
        if entry.samples and sampled is not None:
            reason = self._append(request, sampled, now)
            if isinstance(request.kv, Prefill):
                self._announce(request, entry.end, sampled.token_id)
                request.prefilled = True
                self._board.finish(request, reason, now)
            elif reason is not None:
                self._board.finish(request, reason, now)
        elif isinstance(request.kv, Prefill):
            self._announce(request, entry.end, None)

    def _append(self, request: Request, sampled: Sampled, now: float) -> FinishReason | None:
        index = request.output_len
        request.tokens.append(sampled.token_id)
        reason = request.finish_reason()
        if request.first_token_at is None:
            request.first_token_at = now
        self._board.totals.output_tokens += 1
        self._board.events.append(
            TokenOut(
                request.request_id,
                index,
                sampled.token_id,
                sampled.logprobs,
                reason,
                sampled.token_id if reason == "stop" else None,
            )
        )
        return reason

    def _adopt_first_token(self, request: Request, token: int, now: float) -> None:
        """The prefill engine sent this token to the client; it is told again only if it is the last one."""
        request.tokens.append(token)
        request.first_token_at = now
        reason = request.finish_reason()
        if reason is not None:
            stop_token = token if reason == "stop" else None
            index = request.output_len - 1
            self._board.events.append(TokenOut(request.request_id, index, token, None, reason, stop_token))
            self._board.finish(request, reason, now)

    def _announce(self, request: Request, end: int, token: int | None) -> None:
        first = request.num_announced // self.pool.block_size
        blocks = request.block_ids[first : self.pool.blocks_for(end)]
        request.num_announced = end
        self._board.events.append(ChunkComputed(request.request_id, first, blocks, end, token is not None, token))

    def _publish(self, request: Request, end: int) -> None:
        """Offer the full blocks among the first `end` tokens to the prefix cache."""
        full = end // self.pool.block_size
        for index in range(request.num_published, full):
            self.pool.publish(request.block_ids[index], request.chain.digest(index))
        request.num_published = max(request.num_published, full)

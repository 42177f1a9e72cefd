"""The state of all requests of an engine, and the transitions that end one."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import InvalidRequest, RequestError
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits
from tandem.scheduling.events import Event, Finished, FinishReason, PrefillEnded, PullEnded, ShortOfBlocks
from tandem.scheduling.request import Request, RequestState
from tandem.scheduling.request_queue import RequestQueue
from tandem.wire.messages import Failed, Prefill, PullKv


@dataclass(slots=True)
class Totals:
    """Counts since the engine started."""

    requests: int = 0
    requests_failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
    steps: int = 0


class SchedulerState:
    """All requests that have not ended: each is in `requests` and in the one queue of its state.

    Attributes:
        waiting_local: WAITING, to be computed here (Local and Prefill).
        waiting_pull: WAITING, to get its KV from a peer (PullKv).
        waiting_for_kv: WAITING_FOR_KV.
        waiting_for_slot: WAITING_FOR_SLOT.
        running: RUNNING.
        quarantined: blocks by request whose reads go on although the request no longer wants them.
        events: what happened since the caller took them last.
    """

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.requests: dict[str, Request] = {}
        self.waiting_local = RequestQueue()
        self.waiting_pull = RequestQueue()
        self.waiting_for_kv = RequestQueue()
        self.waiting_for_slot = RequestQueue()
        self.running = RequestQueue()
        self.quarantined: dict[str, list[int]] = {}
        self.events: list[Event] = []
        self.totals = Totals()
        self._short_of_blocks = False

    def enter(self, request: Request, state: RequestState) -> None:
        request.state = state
        self._queue(request).add(request)

    def leave_queue(self, request: Request) -> None:
        self._queue(request).remove(request)

    def move(self, request: Request, state: RequestState) -> None:
        self.leave_queue(request)
        self.enter(request, state)

    def finish(self, request: Request, reason: FinishReason | None, now: float) -> None:
        self.end(request)
        self.events.append(Finished(request.request_id, reason, request.stats(now)))

    def fail(self, request: Request, error: RequestError, now: float) -> None:
        self.totals.requests_failed += 1
        self.end(request)
        stats = request.stats(now)
        self.events.append(
            Failed(request.request_id, error.code, str(error), error.param, error.retry_after, stats=stats)
        )

    def end(self, request: Request) -> None:
        """Forget a request. Its blocks go once no batch with it is in flight."""
        self.leave_queue(request)
        del self.requests[request.request_id]
        if isinstance(request.kv, PullKv) and request.state in (RequestState.WAITING, RequestState.WAITING_FOR_KV):
            self.events.append(PullEnded(request.request_id, self.quarantine_reads(request)))
        request.state = RequestState.FINISHED
        if not request.inflight:
            self.release_blocks(request)

    def release_blocks(self, request: Request) -> None:
        """Part with the blocks of a finished request: those of a Prefill request become leased, others free."""
        blocks, request.block_ids = request.block_ids, []
        if isinstance(request.kv, Prefill):
            self.pool.lease(blocks)
            self.events.append(PrefillEnded(request.request_id, blocks, request.prefilled))
        else:
            self.pool.free(blocks)

    def quarantine_reads(self, request: Request) -> bool:
        """Quarantine the blocks that reads may be writing into; return whether there were any."""
        first = request.num_cached // self.pool.block_size
        last = self.pool.blocks_for(len(request.tokens))
        reads = request.block_ids[first:last]
        if not reads:
            return False
        self.pool.quarantine(reads)
        self.quarantined[request.request_id] = reads
        request.block_ids = request.block_ids[:first] + request.block_ids[last:]
        return True

    def note_short_of_blocks(self, short: bool) -> None:
        """Say so, when that changes."""
        if short != self._short_of_blocks:
            self._short_of_blocks = short
            self.events.append(ShortOfBlocks(short))

    def too_big(self, request: Request, num_tokens: int) -> InvalidRequest | None:
        """Return the error of a request that needs KV for `num_tokens` tokens, if this engine can never hold that."""
        needed = self.pool.blocks_for(num_tokens)
        if needed <= self.pool.num_blocks:
            return None
        return InvalidRequest(
            f"prompt ({request.prompt_len} tokens) and output ({request.output_len} tokens so far) need {needed} KV "
            f"blocks of {self.pool.block_size} tokens; this engine has {self.pool.num_blocks}. Ask for fewer "
            "max_tokens or give the engine more --kv-memory.",
            param="max_tokens",
        )

    def _queue(self, request: Request) -> RequestQueue:
        match request.state:
            case RequestState.WAITING:
                return self.waiting_pull if isinstance(request.kv, PullKv) else self.waiting_local
            case RequestState.WAITING_FOR_KV:
                return self.waiting_for_kv
            case RequestState.WAITING_FOR_SLOT:
                return self.waiting_for_slot
            case RequestState.RUNNING:
                return self.running
            case RequestState.FINISHED:
                raise ValueError(f"request {request.request_id} has finished")

"""Where every request stands, and the ways out."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import InvalidRequest, RequestError
from tandem.kv.blocks import BlockPool
from tandem.scheduling.admission import Limits
from tandem.scheduling.events import Event, Finished, FinishReason, PrefillEnded, PullEnded
from tandem.scheduling.request import Request, RequestState
from tandem.scheduling.request_queue import RequestQueue
from tandem.wire.messages import Failed, Local, Prefill, PullKv


@dataclass(slots=True)
class Totals:
    """Counts since the engine started."""

    requests: int = 0
    requests_failed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
    kv_failures: int = 0
    steps: int = 0


class SchedulerState:
    """The scheduler's state: each living request is in `requests` and in the one lane of its state.

    Attributes:
        local: WAITING, to be computed here (Local and Prefill).
        pulls: WAITING, to be read from a peer.
        loading: WAITING_FOR_KV.
        ready: WAITING_FOR_SLOT.
        running: RUNNING.
        quarantined: blocks by request whose reads go on although the request no longer wants them.
    """

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.requests: dict[str, Request] = {}
        self.local = RequestQueue()
        self.pulls = RequestQueue()
        self.loading = RequestQueue()
        self.ready = RequestQueue()
        self.running = RequestQueue()
        self.quarantined: dict[str, list[int]] = {}
        self.events: list[Event] = []
        self.totals = Totals()

    def enter(self, request: Request, state: RequestState) -> None:
        request.state = state
        self._lane(request).add(request)

    def move(self, request: Request, state: RequestState) -> None:
        self._lane(request).remove(request)
        self.enter(request, state)

    def finish(self, request: Request, reason: FinishReason | None, now: float) -> None:
        self._end(request)
        self.events.append(Finished(request.request_id, reason, request.stats(now)))

    def fail(self, request: Request, error: RequestError, now: float) -> None:
        self.totals.requests_failed += 1
        self._end(request)
        self.events.append(
            Failed(
                request.request_id,
                error.code,
                str(error),
                param=error.param,
                retry_after=error.retry_after,
                stats=request.stats(now),
            )
        )

    def drop(self, request: Request) -> None:
        """End a request that nobody wants to hear of."""
        self._end(request)

    def preempt(self, request: Request) -> None:
        """Take the blocks from a running or ready request that has no batch in flight; it computes them again."""
        self.totals.preemptions += 1
        self._wait_again(request, "preempted: the engine ran out of KV blocks")

    def give_up_pull(self, request: Request, reason: str, reading: bool) -> None:
        """Let a PullKv request that has no KV yet compute it here."""
        self.totals.kv_failures += 1
        self._leave_pull_blocks(request, reading)
        self._wait_again(request, reason)

    def give_back(self, request: Request) -> None:
        """Part with the blocks of a finished request; no batch with it is in flight."""
        blocks, request.block_ids = request.block_ids, []
        if isinstance(request.kv, Prefill):
            self.pool.lease(blocks)
            self.events.append(PrefillEnded(request.request_id, blocks, request.prefilled))
        else:
            self.pool.free(blocks)

    def too_big(self, request: Request, num_tokens: int) -> InvalidRequest | None:
        """Why a request can never have KV for so many tokens, if it cannot."""
        needed = self.pool.blocks_for(num_tokens)
        if needed <= self.pool.num_blocks:
            return None
        return InvalidRequest(
            f"prompt ({request.prompt_len} tokens) and output ({request.output_len} tokens so far) need {needed} KV "
            f"blocks of {self.pool.block_size} tokens; this engine has {self.pool.num_blocks}. Ask for fewer "
            "max_tokens or give the engine more --kv-memory.",
            param="max_tokens",
        )

    def _lane(self, request: Request) -> RequestQueue:
        match request.state:
            case RequestState.WAITING:
                return self.pulls if isinstance(request.kv, PullKv) else self.local
            case RequestState.WAITING_FOR_KV:
                return self.loading
            case RequestState.WAITING_FOR_SLOT:
                return self.ready
            case RequestState.RUNNING:
                return self.running
            case RequestState.FINISHED:
                raise ValueError(f"request {request.request_id} has finished")

    def _wait_again(self, request: Request, reason: str) -> None:
        self._lane(request).remove(request)
        blocks, request.block_ids = request.block_ids, []
        self.pool.free(blocks)
        request.recompute(reason)
        request.kv = Local()
        self.enter(request, RequestState.WAITING)

    def _end(self, request: Request) -> None:
        self._lane(request).remove(request)
        del self.requests[request.request_id]
        if isinstance(request.kv, PullKv) and request.state in (RequestState.WAITING, RequestState.WAITING_FOR_KV):
            quarantined = self._leave_pull_blocks(request, reading=True)
            self.events.append(PullEnded(request.request_id, quarantined))
        request.state = RequestState.FINISHED
        if not request.inflight:
            self.give_back(request)

    def _leave_pull_blocks(self, request: Request, reading: bool) -> bool:
        """Take the blocks that reads may be writing into out of the block table; whether there were any."""
        first = request.num_cached // self.pool.block_size
        last = self.pool.blocks_for(len(request.tokens))
        reads = request.block_ids[first:last] if reading else []
        if not reads:
            return False
        self.pool.quarantine(reads)
        self.quarantined[request.request_id] = reads
        request.block_ids = request.block_ids[:first] + request.block_ids[last:]
        return True

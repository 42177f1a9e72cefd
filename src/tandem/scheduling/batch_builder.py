"""Builds the next batch: continuous batching with chunked prefill under a token budget.

After Orca (Yu et al., OSDI 2022) for batching by iteration and Sarathi-Serve (Agrawal et al., OSDI 2024) for chunks
that share a batch with decode rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.scheduling.events import BlocksAllocated
from tandem.scheduling.preemption import allocate_by_preemption
from tandem.scheduling.request import Request, RequestState, Shortage
from tandem.scheduling.state import SchedulerState
from tandem.wire.messages import Prefill, PullKv


@dataclass(frozen=True, slots=True)
class BatchEntry:
    """A row of a batch: tokens [end - count, end) of the request; `samples`: a token is chosen after them."""

    request: Request
    count: int
    end: int
    samples: bool


class BatchBuilder:
    """Builds one batch: decode rows first, then running prefills, then requests that wait.

    Blocks: a running request that cannot grow preempts others (`tandem.scheduling.preemption`), or else pauses until
    others end. A Prefill request, which cannot be preempted, gets all its blocks at admission. No request is admitted
    while a running one lacks blocks.

    Running slots: Local and Prefill requests, and PullKv requests that have their KV, share `max_num_seqs` slots in
    the order of their arrival. As many PullKv requests again may fetch their KV meanwhile, so that it is there when a
    slot is; a peer that is slow to deliver costs no slot.
    """

    def __init__(self, state: SchedulerState, pipeline_depth: int, now: float) -> None:
        self._entries: list[BatchEntry] = []
        self._state = state
        self._pipeline_depth = pipeline_depth
        self._now = now
        self._tokens_left = state.limits.max_batched_tokens
        self._short_of_blocks = False

    def build(self) -> list[BatchEntry]:
        running = list(self._state.running)
        # One batch must not take all decode rows, or the others that keep a pipeline's stages busy would have none.
        share = -(-len(running) // self._pipeline_depth)
        for request in running:
            if request.num_pending == 1 and len(self._entries) < share:
                self._advance(request)
        for request in running:
            if request.num_pending > 1:
                self._advance(request)
        while not self._short_of_blocks and (head := self._next_to_admit()) is not None:
            self._admit(head)
        # A request that has its blocks need not stand behind an earlier arrival that waits for some, maybe for these.
        while self._has_slot and (head := self._state.waiting_for_slot.head):
            self._run(head)
        self._state.note_short_of_blocks(self._short_of_blocks)
        return self._entries

    @property
    def _has_room(self) -> bool:
        return self._tokens_left > 0 and len(self._entries) < self._state.limits.max_num_seqs

    @property
    def _has_slot(self) -> bool:
        return self._has_room and len(self._state.running) < self._state.limits.max_num_seqs

    def _add_entry(self, request: Request, count: int) -> None:
        request.num_computed += count
        request.inflight += 1
        self._tokens_left -= count
        self._entries.append(BatchEntry(request, count, request.num_computed, request.num_pending == 0))

    def _advance(self, request: Request) -> None:
        # It was running when this batch was begun, but may have been preempted since.
        if not self._has_room or request.state is not RequestState.RUNNING:
            return
        count = min(request.num_pending, self._tokens_left)
        if self._grow(request, request.num_computed + count):
            self._add_entry(request, count)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Make the block table cover `num_tokens`; return whether it does."""
        pool = self._state.pool
        missing = pool.blocks_for(num_tokens) - len(request.block_ids)
        if missing <= 0:
            return True
        if error := self._state.too_big(request, num_tokens):
            if not request.inflight:
                self._state.fail(request, error, self._now)
            return False
        self._short_of_blocks |= missing > pool.available
        blocks = allocate_by_preemption(self._state, request, missing)
        if blocks is None:
            return False
        request.block_ids.extend(blocks)
        return True

    def _next_to_admit(self) -> Request | None:
        """Return the earliest arrival among the heads of those queues that may be admitted from."""
        state, heads = self._state, []
        if self._has_slot:
            heads += [state.waiting_local.head, state.waiting_for_slot.head]
        if len(state.waiting_for_kv) + len(state.waiting_for_slot) < state.limits.max_num_seqs:
            heads.append(state.waiting_pull.head)
        return min((head for head in heads if head is not None), key=lambda head: head.order, default=None)

    def _admit(self, request: Request) -> None:
        if request.state is RequestState.WAITING_FOR_SLOT:
            self._run(request)
        elif error := self._state.too_big(request, len(request.tokens)):
            self._state.fail(request, error, self._now)
        elif isinstance(request.kv, PullKv):
            self._admit_pull(request, request.kv)
        else:
            self._admit_local(request)

    def _run(self, request: Request) -> None:
        self._state.move(request, RequestState.RUNNING)
        self._advance(request)

    def _admit_local(self, request: Request) -> None:
        length = len(request.tokens)
        # The last token is always computed, as the next one is sampled from it.
        if not self._start_with_cached_prefix(request, 0 if request.needs_scores else length - 1, length):
            return
        count = min(request.num_pending, self._tokens_left)
        self._state.move(request, RequestState.RUNNING)
        self._grow(request, length if isinstance(request.kv, Prefill) else request.num_computed + count)
        self._add_entry(request, count)

    def _admit_pull(self, request: Request, kv: PullKv) -> None:
        length = len(request.tokens)
        if not self._start_with_cached_prefix(request, length if kv.first_token else length - 1, length + 1):
            return
        self._grow(request, length + 1)
        self._state.move(request, RequestState.WAITING_FOR_KV)
        self._state.events.append(
            BlocksAllocated(request.request_id, request.block_ids.copy(), request.num_cached, length)
        )

    def _start_with_cached_prefix(self, request: Request, max_cached: int, num_tokens: int) -> bool:
        """Start the block table with cached blocks, if the pool has room for `num_tokens` in all.

        One block for each running request is left alone, so that admission does not lead to preemption at once.
        """
        state, pool = self._state, self._state.pool
        needed = pool.blocks_for(num_tokens) + len(state.running)
        if self._is_still_short(request, max_cached, needed):
            self._short_of_blocks = True
            return False
        hit = pool.match_prefix(request.chain, max_cached)
        if needed - len(hit) > pool.available:
            spare = pool.available
            pool.free(hit)
            request.shortage = Shortage(len(hit), spare - pool.freed)
            self._short_of_blocks = True
            return False
        request.shortage = None
        cached = len(hit) * pool.block_size
        request.block_ids = hit
        request.num_computed = request.num_cached = cached
        request.num_published = len(hit)
        if request.admitted_at is None:
            request.admitted_at = self._now
            request.prefix_tokens = cached
            state.totals.prompt_tokens += len(request.tokens)
            state.totals.prefix_tokens += cached
        return True

    def _is_still_short(self, request: Request, max_cached: int, needed: int) -> bool:
        """Return whether a request that was not admitted cannot be admitted now either, without matching its prefix.

        The match can be longer only if the block after it was published. A block of it that is lost since counts as
        spare and is needed again; so beyond what was spare there is no more than what has become available.
        """
        pool, shortage = self._state.pool, request.shortage
        if shortage is None:
            return False
        if shortage.hits < max_cached // pool.block_size and pool.is_published(request.chain.digest(shortage.hits)):
            return False
        return needed - shortage.hits > shortage.spare + pool.freed

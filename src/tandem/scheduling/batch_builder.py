"""What goes into the next batch: continuous batching with chunked prefill under a token budget.

After Orca (Yu et al., OSDI 2022) for batching by iteration, vLLM (Kwon et al., SOSP 2023) for preemption by
recomputation and Sarathi-Serve (Agrawal et al., OSDI 2024) for chunks that share a batch with decode rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.scheduling.events import BlocksAllocated
from tandem.scheduling.request import Request, RequestState
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
    """Packs one batch: decode rows first, then running prefills, then who waits.

    Blocks: a running request that cannot grow takes them from the request that arrived last, if that arrived after
    itself or has no seat yet; else it pauses until others end. A Prefill request, which others may be reading, is
    never preempted and so gets all its blocks at admission. Nobody is admitted while somebody who runs lacks blocks.

    Seats: Local, Prefill and ready PullKv requests share `max_num_seqs` seats in the order of their arrival. As many
    PullKv requests again may fetch their KV meanwhile, so that it is there when a seat is; a peer that is slow to
    deliver costs no seat.
    """

    def __init__(self, board: SchedulerState, pipeline_depth: int, now: float) -> None:
        self.entries: list[BatchEntry] = []
        self._board = board
        self._pipeline_depth = pipeline_depth
        self._now = now
        self._tokens_left = board.limits.max_batched_tokens
        self._short_of_blocks = False

    def pack(self) -> list[BatchEntry]:
        running = list(self._board.running)
        # One batch must not take all decode rows, or the others that keep a pipeline's stages busy would have none.
        share = -(-len(running) // self._pipeline_depth)
        for request in running:
            if request.num_pending == 1 and len(self.entries) < share:
                self._advance(request)
        for request in running:
            if request.num_pending > 1:
                self._advance(request)
        while not self._short_of_blocks and (head := self._next_to_admit()) is not None:
            self._admit(head)
        self._seat_ready()
        return self.entries

    @property
    def _has_room(self) -> bool:
        return self._tokens_left > 0 and len(self.entries) < self._board.limits.max_num_seqs

    def _take(self, request: Request, count: int) -> None:
        request.num_computed += count
        request.inflight += 1
        self._tokens_left -= count
        self.entries.append(BatchEntry(request, count, request.num_computed, request.num_pending == 0))

    def _advance(self, request: Request) -> None:
        # It was running when packing began, but may have been preempted since.
        if not self._has_room or request.state is not RequestState.RUNNING:
            return
        count = min(request.num_pending, self._tokens_left)
        if self._grow(request, request.num_computed + count):
            self._take(request, count)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Make the block table cover `num_tokens`."""
        pool = self._board.pool
        missing = pool.blocks_for(num_tokens) - len(request.block_ids)
        if missing <= 0:
            return True
        if error := self._board.too_big(request, num_tokens):
            if not request.inflight:
                self._board.fail(request, error, self._now)
            return False
        while (blocks := pool.allocate(missing)) is None:
            victim = self._victim(request)
            if victim is None:
                self._short_of_blocks = True
                return False
            self._short_of_blocks = True
            self._board.preempt(victim)
        request.block_ids.extend(blocks)
        return True

    def _victim(self, request: Request) -> Request | None:
        """Who must give way to `request`.

        Among those with a seat only a later arrival does, or two could take each other's blocks for ever. Who has
        no seat yet always does, or it could wait for the seat of one that waits for its blocks.
        """
        for other in reversed(self._board.ready):
            return other
        for other in reversed(self._board.running):
            if other.order <= request.order:
                return None
            if not other.inflight and not isinstance(other.kv, Prefill):
                return other
        return None

    def _next_to_admit(self) -> Request | None:
        """The earliest arrival among the heads of those lanes that have a seat."""
        board = self._board
        heads = []
        if self._has_room and len(board.running) < board.limits.max_num_seqs:
            heads += [board.local.head, board.ready.head]
        if len(board.loading) + len(board.ready) < board.limits.max_num_seqs:
            heads.append(board.pulls.head)
        return min((head for head in heads if head is not None), key=lambda head: head.order, default=None)

    def _admit(self, request: Request) -> None:
        if request.state is RequestState.WAITING_FOR_SLOT:
            self._seat(request)
        elif error := self._board.too_big(request, len(request.tokens)):
            self._board.fail(request, error, self._now)
        elif isinstance(request.kv, PullKv):
            self._admit_pull(request, request.kv)
        else:
            self._admit_local(request)

    def _seat(self, request: Request) -> None:
        self._board.move(request, RequestState.RUNNING)
        self._advance(request)

    def _seat_ready(self) -> None:
        """Who has its blocks already need not stand behind an earlier arrival that waits for some, maybe for these."""
        board = self._board
        while self._has_room and len(board.running) < board.limits.max_num_seqs and (head := board.ready.head):
            self._seat(head)

    def _admit_local(self, request: Request) -> None:
        length = len(request.tokens)
        # The last token is always computed, as the next one is sampled from it.
        if not self._hold_prefix(request, length - 1, length):
            return
        count = min(request.num_pending, self._tokens_left)
        self._board.move(request, RequestState.RUNNING)
        self._grow(request, length if isinstance(request.kv, Prefill) else request.num_computed + count)
        self._take(request, count)

    def _admit_pull(self, request: Request, kv: PullKv) -> None:
        length = len(request.tokens)
        if not self._hold_prefix(request, length if kv.first_token else length - 1, length + 1):
            return
        self._grow(request, length + 1)
        self._board.move(request, RequestState.WAITING_FOR_KV)
        self._board.events.append(
            BlocksAllocated(request.request_id, request.block_ids.copy(), request.num_cached, length)
        )

    def _hold_prefix(self, request: Request, max_cached: int, num_tokens: int) -> bool:
        """Start the block table with what the prefix cache has, if there is room for `num_tokens` in all.

        One block for each running request is left alone, so that admission does not lead to preemption at once.
        """
        pool = self._board.pool
        hit = pool.match_prefix(request.chain, max_cached)
        if pool.blocks_for(num_tokens) - len(hit) + len(self._board.running) > pool.available:
            pool.free(hit)
            self._short_of_blocks = True
            return False
        cached = len(hit) * pool.block_size
        request.block_ids = hit
        request.num_computed = request.num_cached = cached
        request.num_published = len(hit)
        if request.admitted_at is None:
            request.admitted_at = self._now
            request.prefix_tokens = cached
            self._board.totals.prompt_tokens += len(request.tokens)
            self._board.totals.prefix_tokens += cached
        return True

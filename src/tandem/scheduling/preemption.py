"""Preemption: when KV blocks run out, a request gives its blocks to another and is recomputed later.

Recomputation rather than swapping, as in vLLM (Kwon et al., SOSP 2023). A Prefill request, whose blocks others may be
reading, is never preempted, and neither is a request with a batch in flight.
"""

from __future__ import annotations

from tandem.scheduling.request import Request, RequestState
from tandem.scheduling.state import SchedulerState
from tandem.wire.messages import Local, Prefill


def allocate_by_preemption(state: SchedulerState, request: Request, num_blocks: int) -> list[int] | None:
    """Allocate blocks for a running request, preempting others until there are enough; None if no victim is left."""
    while (blocks := state.pool.allocate(num_blocks)) is None:
        victim = _choose_victim(state, request)
        if victim is None:
            return None
        state.totals.preemptions += 1
        recompute(state, victim, "preempted: the engine ran out of KV blocks")
    return blocks


def recompute(state: SchedulerState, request: Request, reason: str) -> None:
    """Take the blocks of a request and let it wait to be computed here from its first token; its output stays."""
    state.leave_queue(request)
    blocks, request.block_ids = request.block_ids, []
    state.pool.free(blocks)
    request.num_computed = 0
    request.recomputations += 1
    request.recompute_reason = reason
    request.kv = Local()
    state.enter(request, RequestState.WAITING)


def _choose_victim(state: SchedulerState, request: Request) -> Request | None:
    """Return the request that must give way to `request`, the latest arrival first.

    Of the running requests only a later arrival does, or two could take each other's blocks for ever. A request without
    a running slot always does, or it could wait for the slot of one that waits for its blocks.
    """
    for other in reversed(state.waiting_for_slot):
        return other
    for other in reversed(state.running):
        if other.order <= request.order:
            return None
        if not other.inflight and not isinstance(other.kv, Prefill):
            return other
    return None

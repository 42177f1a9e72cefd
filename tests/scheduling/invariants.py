"""What must hold between the requests, queues and blocks of a scheduler at any time."""

from __future__ import annotations

from collections import Counter

from tandem.scheduling.request import RequestState
from tandem.scheduling.scheduler import Scheduler


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise AssertionError if requests, queues and blocks contradict each other. O(everything)."""
    pool, state = scheduler.pool, scheduler.state
    pool.check()
    queues = (state.waiting_local, state.waiting_pull, state.waiting_for_kv, state.waiting_for_slot, state.running)
    queued = [request for queue in queues for request in queue]
    assert sorted(queued, key=id) == sorted(state.requests.values(), key=id), "a request is lost"
    entries = [entry for batch in scheduler.in_flight for entry in batch.entries]
    rows = Counter(entry.request.order for entry in entries)
    ending = {e.request.order: e.request for e in entries if e.request.state is RequestState.FINISHED}
    held: Counter[int] = Counter()
    for request in [*queued, *ending.values()]:
        held.update(request.block_ids)
        assert request.inflight == rows[request.order], "inflight does not count the batches in flight"
        assert request.num_computed <= len(request.tokens), "more is computed than there is"
        if request.state is RequestState.WAITING:
            assert not request.block_ids, "a waiting request holds blocks"
            assert not request.inflight, "a waiting request is in flight"
        else:
            covered = len(request.block_ids) * pool.block_size
            assert request.num_computed <= covered, "a block table does not cover what is computed"
    for block in range(pool.num_blocks):
        assert held[block] + pool.leases(block) == pool.references(block), f"block {block} has leaked"

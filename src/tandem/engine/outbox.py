"""The way out of the step loop, to the leader's event loop."""

from __future__ import annotations

from typing import Protocol

from tandem.scheduling.events import BlocksAllocated, ChunkComputed, PrefillEnded, PullEnded, ShortOfBlocks
from tandem.wire.engine_status import EngineCounters, KvUsage, RequestCounts
from tandem.wire.messages import Output

Outputs = dict[int, list[Output]]
"""By the number of the frontend that they go to."""

KvEvent = ChunkComputed | PrefillEnded | BlocksAllocated | PullEnded | ShortOfBlocks


class Outbox(Protocol):
    """Takes what a step produces, without waiting, and handles it in the order in which it was posted."""

    def post_kv(self, events: list[KvEvent]) -> None:
        """Announce chunks to decode engines, start reads, or end what was begun for a request."""

    def post_outputs(self, outputs: Outputs) -> None:
        """Send to the frontends."""

    def post_status(self, kv: KvUsage, requests: RequestCounts, counters: EngineCounters) -> None:
        """Show this in the engine's status from now on. `counters`: those of the step loop."""

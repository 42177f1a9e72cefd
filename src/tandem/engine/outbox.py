"""What the step loop hands to the leader's event loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tandem.scheduling.events import BlocksAllocated, ChunkComputed, PrefillEnded, PullEnded
from tandem.wire.messages import EngineCounters, Failed, KvUsage, RequestCounts, Tokens

KvEvent = ChunkComputed | PrefillEnded | BlocksAllocated | PullEnded


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the scheduler a moment ago, and what was done since the start."""

    kv: KvUsage
    requests: RequestCounts
    counters: EngineCounters


class Outbox(Protocol):
    """Takes without waiting what the step loop has; handled in the order in which it was posted."""

    def post_kv(self, events: list[KvEvent]) -> None:
        """Tell peers, or start reads."""

    def post_outputs(self, outputs: dict[int, list[Tokens | Failed]]) -> None:
        """Send to the frontends, by their number."""

    def post_snapshot(self, snapshot: Snapshot) -> None:
        """Show this in the engine's status from now on."""

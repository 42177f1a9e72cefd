"""What the connector counts, through vLLM's own hooks into its log and its /metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "handoffs": "Prompts whose KV was read from another engine.",
    "bytes": "Bytes of KV that were read from other engines.",
    "descriptors": "Runs of bytes in which they were read.",
    "read_seconds": "Seconds that the reads of a prompt took, each as long as on the slowest rank.",
    "failures": "Prompts whose KV should have come from another engine and did not.",
    "exports": "Prompts whose KV was offered to other engines.",
    "leases_ended": "Offered prompts that a reader had claimed before it fell silent.",
    "exports_refused": "Prompts whose KV was asked for and not offered: the arena had no room, or they ended early.",
}
"""By name; each is a counter `vllm:tandem_<name>_total`."""


@dataclass
class TandemStats(KVConnectorStats):  # type: ignore[misc]  # vLLM may not be installed
    """Counts since the last report, by the names of COUNTERS."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, count in other.data.items():
            self.data[name] = self.data.get(name, 0) + count
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class TandemPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]  # vLLM may not be installed
    """One counter for each of COUNTERS and each engine of the process."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=f"vllm:tandem_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, count in transfer_stats_data.items():
            self._counters[name].labels(*self.per_engine_labelvalues[engine_idx]).inc(count)

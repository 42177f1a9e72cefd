"""What a benchmark measured: one record a request, and their summary. Pure; all times in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from tandem.api.backend import ServingDetails

STAGES = ("queue_time", "prefill_time", "transfer_time", "handoff_time")
AMOUNTS = ("blocks", "bytes", "descriptors")


class Record(msgspec.Struct, frozen=True):
    """One request.

    Attributes:
        sent, ended: since the benchmark began.
        itl: from each event of the stream to the next.
        output_tokens: 0 for a request that failed.
        error: why it failed, or None.
        tandem: how it was made; None from other servers.
    """

    prompt_tokens: int
    output_tokens: int
    sent: float
    ended: float
    ttft: float
    itl: list[float]
    finish_reason: str | None = None
    error: str | None = None
    tandem: ServingDetails | None = None

    @property
    def e2e(self) -> float:
        return self.ended - self.sent

    @property
    def tpot(self) -> float:
        """Time per output token after the first."""
        return (self.e2e - self.ttft) / max(1, self.output_tokens - 1)


class Percentiles(msgspec.Struct, frozen=True):
    mean: float
    median: float
    p90: float
    p99: float


class Slo(msgspec.Struct, frozen=True):
    """What a request must keep to count as goodput; None is kept by all. (DistServe, OSDI 2024.)"""

    ttft: float | None = None
    tpot: float | None = None

    @property
    def is_set(self) -> bool:
        return self.ttft is not None or self.tpot is not None

    def is_met(self, record: Record) -> bool:
        return (self.ttft is None or record.ttft <= self.ttft) and (self.tpot is None or record.tpot <= self.tpot)


class Hops(msgspec.Struct, frozen=True):
    """From the `tandem` objects.

    Attributes:
        times: by name of a stage.
        amounts: moved for one request, by name.
        total_bytes: of all requests.
        reasons: why requests were not disaggregated, and how many.
        transports: how many requests each moved.
    """

    requests: int
    disaggregated: int
    recomputations: int
    total_bytes: int
    times: dict[str, Percentiles]
    amounts: dict[str, Percentiles]
    reasons: dict[str, int]
    transports: dict[str, int]


class Summary(msgspec.Struct, frozen=True):
    """`goodput`: requests a second that met the goal; None without one. Spreads are None if nothing succeeded."""

    requests: int
    failed: int
    errors: dict[str, int]
    duration: float
    prompt_tokens: int
    output_tokens: int
    requests_per_second: float
    output_tokens_per_second: float
    goodput: float | None
    ttft: Percentiles | None
    itl: Percentiles | None
    tpot: Percentiles | None
    e2e: Percentiles | None
    hops: Hops | None


def spread(values: Iterable[float]) -> Percentiles | None:
    found = np.fromiter(values, dtype=np.float64)
    if not len(found):
        return None
    median, p90, p99 = np.percentile(found, (50, 90, 99))
    return Percentiles(float(found.mean()), float(median), float(p90), float(p99))


def summary(records: Sequence[Record], duration: float, goal: Slo) -> Summary:
    """Of all records; times and throughput are of those that succeeded.

    Args:
        duration: from the first request to the end of the last.
    """
    good = [record for record in records if record.error is None]
    duration = max(duration, 1e-9)
    output_tokens = sum(record.output_tokens for record in good)
    return Summary(
        requests=len(records),
        failed=len(records) - len(good),
        errors=dict(Counter(record.error for record in records if record.error is not None)),
        duration=duration,
        prompt_tokens=sum(record.prompt_tokens for record in good),
        output_tokens=output_tokens,
        requests_per_second=len(good) / duration,
        output_tokens_per_second=output_tokens / duration,
        goodput=sum(map(goal.is_met, good)) / duration if goal.is_set else None,
        ttft=spread(record.ttft for record in good),
        itl=spread(gap for record in good for gap in record.itl),
        tpot=spread(record.tpot for record in good if record.output_tokens > 1),
        e2e=spread(record.e2e for record in good),
        hops=hops([record.tandem for record in good if record.tandem is not None]),
    )


def hops(made: Sequence[ServingDetails]) -> Hops | None:
    if not made:
        return None
    return Hops(
        requests=len(made),
        disaggregated=sum(how.disaggregated for how in made),
        recomputations=sum(how.recomputations for how in made),
        total_bytes=sum(how.bytes for how in made),
        times=_spreads(STAGES, made),
        amounts=_spreads(AMOUNTS, made),
        reasons=dict(Counter(how.reason or "unknown" for how in made if not how.disaggregated)),
        transports=dict(Counter(how.transport for how in made if how.transport is not None)),
    )


def _spreads(names: Sequence[str], made: Sequence[ServingDetails]) -> dict[str, Percentiles]:
    found = {name: spread(float(getattr(how, name)) for how in made) for name in names}
    return {name: one for name, one in found.items() if one is not None}

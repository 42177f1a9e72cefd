"""Summarizes a benchmark of one record a request. Pure; all times in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from tandem.api.backend import ServingDetails
from tandem.commands.workload import Slo

TIMES = ("queue_time", "prefill_time", "transfer_time", "handoff_time")
AMOUNTS = ("blocks", "bytes", "descriptors")


class Record(msgspec.Struct, frozen=True):
    """One request.

    Attributes:
        sent, ended: since the benchmark began.
        itl: from each event of the stream to the next.
        output_tokens: 0 for a request that failed.
        error: why it failed, or None.
        tandem: how it was served; None from other servers.
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


class ServingSummary(msgspec.Struct, frozen=True):
    """A summary of the `tandem` objects of the responses.

    Attributes:
        times: spent by one request, by name.
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
    """`goodput`: requests a second that met the SLOs; None without SLOs. Percentiles are None if nothing succeeded."""

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
    serving: ServingSummary | None = msgspec.field(name="hops")


def percentiles(values: Iterable[float]) -> Percentiles | None:
    """Return the mean and percentiles, interpolated; None of no values."""
    found = np.fromiter(values, dtype=np.float64)
    if not len(found):
        return None
    median, p90, p99 = np.percentile(found, (50, 90, 99))
    return Percentiles(float(found.mean()), float(median), float(p90), float(p99))


def summary(records: Sequence[Record], duration: float, slo: Slo) -> Summary:
    """Summarize all records; times and throughput are of the requests that succeeded.

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
        goodput=sum(slo.is_met(record.ttft, record.tpot) for record in good) / duration if slo.is_set else None,
        ttft=percentiles(record.ttft for record in good),
        itl=percentiles(gap for record in good for gap in record.itl),
        tpot=percentiles(record.tpot for record in good if record.output_tokens > 1),
        e2e=percentiles(record.e2e for record in good),
        serving=_serving_summary([record.tandem for record in good if record.tandem is not None]),
    )


def _serving_summary(details: Sequence[ServingDetails]) -> ServingSummary | None:
    if not details:
        return None
    return ServingSummary(
        requests=len(details),
        disaggregated=sum(one.disaggregated for one in details),
        recomputations=sum(one.recomputations for one in details),
        total_bytes=sum(one.bytes for one in details),
        times=_percentiles_of(TIMES, details),
        amounts=_percentiles_of(AMOUNTS, details),
        reasons=dict(Counter(one.reason or "unknown" for one in details if not one.disaggregated)),
        transports=dict(Counter(one.transport for one in details if one.transport is not None)),
    )


def _percentiles_of(names: Sequence[str], details: Sequence[ServingDetails]) -> dict[str, Percentiles]:
    found = {name: percentiles(float(getattr(one, name)) for one in details) for name in names}
    return {name: one for name, one in found.items() if one is not None}

"""Prometheus metrics of the API and, from their heartbeats, of the engines behind it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tandem.api.backend import Backend, EngineState, ServingDetails
from tandem.api.connections import Refusals
from tandem.api.vllm_metrics import AnswerMetrics, VllmCollector
from tandem.wire.engine_status import EngineCounters

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 30, 60, 120)
BETWEEN_TOKENS_S = (0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.4, 0.8, 1.6, 5, 15)
WHOLE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600)
KV_STATES = ("free", "cached", "leased", "in_use")
LABELS = ("engine_id", "role")
REQUEST_STATES = ("waiting", "waiting_for_kv", "running")


class Metrics:
    """The API's own numbers, in a registry of their own.

    Names: `tandem_requests_total{endpoint,outcome}` (outcome: ok, aborted or the error's code),
    `tandem_requests_running`, `tandem_time_to_first_token_seconds`, `tandem_inter_token_latency_seconds`,
    `tandem_request_seconds`, `tandem_prompt_tokens_total`, `tandem_output_tokens_total`,
    `tandem_connections_refused_total{reason}` (what `refusals` counts), and from every engine's
    status `tandem_engine_ready`, `_kv_blocks{state}`, `_live_requests{state}` and its counters. Beside them the same
    under vLLM's names (`tandem.api.vllm_metrics`).
    """

    def __init__(self, backend: Backend, refusals: Refusals) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineCollector(backend))
        registry.register(_RefusalCollector(refusals))
        self._requests = Counter("tandem_requests", "Requests that ended.", ["endpoint", "outcome"], registry=registry)
        self._running = Gauge("tandem_requests_running", "Requests being answered.", ["endpoint"], registry=registry)
        self.first_token = _histogram(registry, "time_to_first_token", "Request to first token.", FIRST_TOKEN_S)
        self.between_tokens = _histogram(registry, "inter_token_latency", "Token to next token.", BETWEEN_TOKENS_S)
        self._whole = _histogram(registry, "request", "Request to end of its answer, if it was answered.", WHOLE_S)
        self.prompt_tokens = Counter("tandem_prompt_tokens", "Prompt tokens of requests taken.", registry=registry)
        self.output_tokens = Counter("tandem_output_tokens", "Tokens generated.", registry=registry)
        self.answers = AnswerMetrics()
        own = {
            "time_to_first_token_seconds": self.first_token,
            "inter_token_latency_seconds": self.between_tokens,
            "time_per_output_token_seconds": self.between_tokens,  # its name until 2025; many dashboards have it
            "e2e_request_latency_seconds": self._whole,
            "prompt_tokens": self.prompt_tokens,
            "generation_tokens": self.output_tokens,
        }
        registry.register(VllmCollector(backend, own | self.answers.by_name()))

    @contextmanager
    def track(self, endpoint: str) -> Iterator[RequestMetrics]:
        """Count one request of `endpoint` from here on; the caller sets `outcome` before it leaves."""
        running = self._running.labels(endpoint)
        running.inc()
        request = RequestMetrics(self)
        try:
            yield request
        finally:
            running.dec()
            self._requests.labels(endpoint, request.outcome).inc()
            if request.outcome == "ok" and request.first_token:
                self._whole.observe(time.monotonic() - request.started)

    def expose(self) -> bytes:
        return generate_latest(self.registry)


@dataclass(slots=True)
class RequestMetrics:
    """Metrics of one request.

    Attributes:
        outcome: "ok", "aborted" or an error's code.
        first_token: whether any of its sequences has a token.
    """

    metrics: Metrics
    outcome: str = "aborted"
    started: float = field(default_factory=time.monotonic)
    first_token: bool = False


class TokenTimer:
    """Times one sequence's tokens. Tokens that come together share the time since the last ones."""

    def __init__(self, request: RequestMetrics, prompt_tokens: int) -> None:
        self._request = request
        self._prompt_tokens = prompt_tokens
        self._tokens = 0
        self._first: float | None = None
        self._last: float | None = None

    def record(self, count: int) -> None:
        if not count:
            return
        now = time.monotonic()
        metrics = self._request.metrics
        metrics.output_tokens.inc(count)
        if not self._request.first_token:
            self._request.first_token = True
            metrics.first_token.observe(now - self._request.started)
        self._tokens += count
        if self._first is None:
            self._first = now
        if self._last is not None:
            for _ in range(count):
                metrics.between_tokens.observe((now - self._last) / count)
        self._last = now

    def ended(self, finish_reason: str, details: ServingDetails | None) -> None:
        """Take note of the sequence's end; `finish_reason` may be abort or error too."""
        answers = self._request.metrics.answers
        answers.ended(finish_reason)
        if finish_reason in ("stop", "length"):
            seconds = self._last - self._first if self._last is not None and self._first is not None else 0.0
            answers.observe(self._prompt_tokens, self._tokens, seconds, details)


class _RefusalCollector(Collector):
    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals

    def collect(self) -> Iterable[Metric]:
        text = "Connections and heads of requests that were refused at the door."
        refused = CounterMetricFamily("tandem_connections_refused", text, labels=("reason",))
        for reason, count in self._refusals.count.items():
            refused.add_metric((reason,), count)
        return [refused]


class _EngineCollector(Collector):
    """Reads the engines' last statuses when /metrics is asked for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterable[Metric]:
        ready = GaugeMetricFamily("tandem_engine_ready", "1 if requests may go to it.", labels=LABELS)
        blocks = GaugeMetricFamily("tandem_engine_kv_blocks", "KV blocks by state.", labels=(*LABELS, "state"))
        requests = GaugeMetricFamily(
            "tandem_engine_live_requests", "Requests in the engine by state.", labels=(*LABELS, "state")
        )
        step = GaugeMetricFamily(
            "tandem_engine_step_seconds", "Seconds for which the step that runs now has run.", labels=LABELS
        )
        counters = {
            name: CounterMetricFamily(f"tandem_engine_{name}", text, labels=LABELS) for name, text in _COUNTERS.items()
        }
        for engine in self._backend.engines():
            status = engine.status
            labels = (status.engine_id, status.role)
            ready.add_metric(labels, float(engine.state is EngineState.READY))
            step.add_metric(labels, status.step_seconds)
            for name in KV_STATES:
                blocks.add_metric((*labels, name), getattr(status.kv, name))
            for name in REQUEST_STATES:
                requests.add_metric((*labels, name), getattr(status.requests, name))
            for name, counter in counters.items():
                counter.add_metric(labels, getattr(status.counters, name))
        return [ready, blocks, requests, step, *counters.values()]


_COUNTERS = {
    counter.name: f"{counter.name.replace('_', ' ')} since the engine started.".capitalize()
    for counter in msgspec.structs.fields(EngineCounters)
}


def _histogram(registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"tandem_{name}_seconds", text, buckets=buckets, registry=registry)

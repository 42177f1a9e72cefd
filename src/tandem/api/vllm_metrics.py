"""The numbers of /metrics under vLLM's names, which endpoint pickers, autoscalers and dashboards read.

Each has the label `model_name`; those of an engine's state have `engine`, its id, too. They say the same as Tandem's
own metrics beside them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from tandem.api.backend import Backend, ServingDetails
from tandem.wire.engine_status import EngineStatus

TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000)
SECONDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480)
LABELS = ("model_name", "engine")


class AnswerMetrics:
    """What vLLM counts of each answer. In no registry: `VllmCollector` shows it, with the model's name."""

    def __init__(self) -> None:
        self._success = Counter("request_success", "Answers, by what ended them.", ["finished_reason"], registry=None)
        self._prompt = _histogram("request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._output = _histogram("request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._queue = _histogram("request_queue_time_seconds", "From arrival to the first step.", SECONDS)
        self._prefill = _histogram("request_prefill_time_seconds", "From the first step to the first token.", SECONDS)
        self._decode = _histogram("request_decode_time_seconds", "From the first token to the last.", SECONDS)

    def ended(self, reason: str) -> None:
        """Count an answer that ended: stop, length, abort or error."""
        self._success.labels(reason).inc()

    def observe(self, prompt_tokens: int, tokens: int, decode_time: float, details: ServingDetails | None) -> None:
        self._prompt.observe(prompt_tokens)
        self._output.observe(tokens)
        self._decode.observe(decode_time)
        if details is not None:
            self._queue.observe(details.queue_time)
            self._prefill.observe(details.prefill_time)

    def by_name(self) -> dict[str, MetricWrapperBase]:
        found = (self._success, self._prompt, self._output, self._queue, self._prefill, self._decode)
        return {next(iter(metric.describe())).name: metric for metric in found}


class VllmCollector(Collector):
    """Shows metrics under vLLM's names.

    Args:
        metrics: by their name at vLLM, less the prefix; without any labels but their own.
    """

    def __init__(self, backend: Backend, metrics: Mapping[str, MetricWrapperBase]) -> None:
        self._backend = backend
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        engines = [engine.status for engine in self._backend.engines()]
        if not engines:
            return  # nobody knows the model's name yet
        yield from _engine_metrics(engines)
        for name, metric in self._metrics.items():
            yield from _renamed(metric, f"vllm:{name}", engines[0].model)


def _engine_metrics(engines: list[EngineStatus]) -> Iterator[Metric]:
    running = GaugeMetricFamily("vllm:num_requests_running", "Requests in the batch.", labels=LABELS)
    waiting = GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait, for KV too.", labels=LABELS)
    usage = GaugeMetricFamily("vllm:kv_cache_usage_perc", "Share of the KV blocks in use; 1 is all.", labels=LABELS)
    config = GaugeMetricFamily(
        "vllm:cache_config_info", "1, with the KV cache's shape.", labels=(*LABELS, "block_size", "num_gpu_blocks")
    )
    queries = CounterMetricFamily("vllm:prefix_cache_queries", "Prompt tokens looked up.", labels=LABELS)
    hits = CounterMetricFamily("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", labels=LABELS)
    preemptions = CounterMetricFamily("vllm:num_preemptions", "Requests that gave way to others.", labels=LABELS)
    for status in engines:
        labels, kv, counters = (status.model, status.engine_id), status.kv, status.counters
        running.add_metric(labels, status.requests.running)
        waiting.add_metric(labels, status.requests.waiting + status.requests.waiting_for_kv)
        usage.add_metric(labels, (kv.in_use + kv.leased) / kv.blocks if kv.blocks else 0.0)
        config.add_metric((*labels, str(kv.block_size), str(kv.blocks)), 1)
        queries.add_metric(labels, counters.prompt_tokens)
        hits.add_metric(labels, counters.prefix_tokens)
        preemptions.add_metric(labels, counters.preemptions)
    yield from (running, waiting, usage, config, queries, hits, preemptions)


def _renamed(metric: MetricWrapperBase, name: str, model: str) -> Iterator[Metric]:
    for family in metric.collect():
        found = Metric(name, family.documentation, family.type)
        for sample in family.samples:
            suffix = sample.name.removeprefix(family.name)
            if suffix != "_created":
                found.add_sample(name + suffix, {"model_name": model, **sample.labels}, sample.value)
        yield found


def _histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(name, text, buckets=buckets, registry=None)

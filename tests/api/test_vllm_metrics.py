from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tandem.errors import EngineFailed
from tests.api.conftest import HANG, Api, FakeBackend, deltas, ids, running
from tests.support.processes import until

SAME = {
    "vllm:time_to_first_token_seconds_count": "tandem_time_to_first_token_seconds_count",
    "vllm:inter_token_latency_seconds_count": "tandem_inter_token_latency_seconds_count",
    "vllm:time_per_output_token_seconds_sum": "tandem_inter_token_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_sum": "tandem_request_seconds_sum",
    "vllm:prompt_tokens_total": "tandem_prompt_tokens_total",
    "vllm:generation_tokens_total": "tandem_output_tokens_total",
}
# By name, as endpoint pickers of llm-d and the Gateway API, KEDA's examples and vLLM's own dashboard ask for them.
WANTED = {
    *("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:cache_config_info"),
    *("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total"),
    *("vllm:request_success_total", "vllm:request_prompt_tokens_bucket", "vllm:request_generation_tokens_bucket"),
    *("vllm:request_queue_time_seconds_sum", "vllm:request_prefill_time_seconds_sum"),
    *("vllm:request_decode_time_seconds_sum", "vllm:time_to_first_token_seconds_bucket", *SAME),
}


@pytest.fixture
def fresh(folder: Path) -> Iterator[Api]:
    """An API whose counts begin at 0."""
    with running(FakeBackend(folder)) as api:
        yield api


def samples(api: Api, **labels: str) -> dict[str, float]:
    """The sum by name of those that have these labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(api.get("/metrics").body.decode()):
        for sample in family.samples:
            if labels.items() <= sample.labels.items():
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found


def test_all_have_the_models_name_and_say_what_our_own_say(fresh: Api) -> None:
    fresh.complete(n=2)
    fresh.complete(stream=True)
    # An answer is out before it is counted.
    assert until(lambda: samples(fresh)["tandem_request_seconds_count"] == 2, 10)
    named, everything = samples(fresh, model_name="tiny"), samples(fresh)
    assert named.keys() >= WANTED
    assert [name for name in everything if name.startswith("vllm:") and everything[name] != named[name]] == []
    assert {name: everything[name] for name in SAME} == {name: everything[ours] for name, ours in SAME.items()}
    assert named["vllm:generation_tokens_total"] == 3 * (len(ids("hello") + ids(" world")) + 1)


def test_an_engines_state_has_its_id(fresh: Api) -> None:
    found = samples(fresh, engine="p0", model_name="tiny")
    assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == (3, 1 + 2)
    assert found["vllm:kv_cache_usage_perc"] == pytest.approx((2 + 1) / 10)
    assert samples(fresh, block_size="16", num_gpu_blocks="10")["vllm:cache_config_info"] == 2


def test_answers_are_counted_by_what_ended_them(fresh: Api) -> None:
    fresh.complete(n=2)
    fresh.complete(stop="hello")
    fresh.backend.script = lambda request: deltas("hello", finish="length")
    fresh.complete()
    fresh.backend.script = lambda request: [*deltas("hello")[:1], EngineFailed("it broke")]
    fresh.complete()
    fresh.backend.script = lambda request: [HANG]
    gone = fresh.connect()
    gone.request("POST", "/v1/completions", b'{"prompt": "x"}')
    assert fresh.backend.hanging.wait(10)
    gone.close()

    def counts() -> dict[str, float]:
        found = {reason: samples(fresh, finished_reason=reason) for reason in ("stop", "length", "error", "abort")}
        return {reason: one["vllm:request_success_total"] for reason, one in found.items() if one}

    assert until(lambda: counts() == {"stop": 3, "length": 1, "error": 1, "abort": 1}, 10)
    assert samples(fresh)["vllm:request_generation_tokens_count"] == 4


def test_text_that_is_only_tokenized_is_no_answer(fresh: Api) -> None:
    assert fresh.send("POST", "/tokenize", {"prompt": "x"}).status == 200
    assert samples(fresh)["tandem_requests_total"] == 1
    assert samples(fresh)["vllm:e2e_request_latency_seconds_count"] == 0

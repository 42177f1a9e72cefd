"""KV that is published to a proxy, and that nobody fetches, does not stand in the way of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.http import Http, completion
from tests.support.processes import until
from tests.support.reference import Reference

ASK = {"do_remote_decode": True}


@pytest.fixture(scope="module")
def small(serve: Serve) -> Deployment:
    """A request that had to wait for published KV to time out, after 60 s, would not end in time."""
    return serve("qwen3", *flags(kv_memory="1MiB", lease_ttl=2, request_timeout=20, connector="tcp"))


@pytest.fixture
def prefill(small: Deployment) -> Http:
    return small.engine("prefill-0")


def blocks(small: Deployment) -> int:
    count: int = small.engines()["prefill-0"]["kv"]["blocks"]
    return count


def flood(small: Deployment, prefill: Http) -> None:
    """Twice what the pool has, each prompt a tenth of it."""
    length = 16 * (blocks(small) // 10)
    for seed in range(20):
        request = completion(prompt_of(length, seed=1000 + seed), max_tokens=1, kv_transfer_params=ASK)
        reply = prefill.send("POST", "/v1/completions", request)
        assert reply.status == 200, reply.body


def test_ordinary_requests_are_served_behind_prompts_that_nobody_fetches(
    small: Deployment, prefill: Http, reference_of: Callable[[str], Reference]
) -> None:
    flood(small, prefill)
    for length in (5, 16 * (blocks(small) // 3), 16 * (blocks(small) * 3 // 4)):
        prompt = prompt_of(length, seed=60)
        assert small.http.complete(prompt, max_tokens=4, ignore_eos=True).token_ids == reference_of("qwen3")(prompt, 4)
    dropped = [
        line for line in small.http.get("/metrics").body.decode().splitlines() if "published_dropped_total{" in line
    ]
    assert any('engine_id="prefill-0"' in line and float(line.split()[-1]) >= 10 for line in dropped), dropped


def test_the_newest_prompt_is_there_for_its_decode_engine(
    small: Deployment, prefill: Http, reference_of: Callable[[str], Reference]
) -> None:
    flood(small, prefill)
    prompt = prompt_of(100, seed=61)
    request = completion(prompt, max_tokens=4, ignore_eos=True)
    first = prefill.send("POST", "/v1/completions", request | {"max_tokens": 1, "kv_transfer_params": ASK})
    params = first.json["kv_transfer_params"]
    reply = small.engine("decode-0").send("POST", "/v1/completions", request | {"kv_transfer_params": params})
    assert reply.token_ids == reference_of("qwen3")(prompt, 4)
    assert reply.how["disaggregated"], reply.how


def test_a_prompt_that_could_not_wait_alone_is_refused_by_the_flags_name(small: Deployment, prefill: Http) -> None:
    limit = 16 * (blocks(small) // 2)
    for length, status in ((limit, 200), (limit + 1, 400)):
        request = completion(prompt_of(length, seed=62), max_tokens=1, kv_transfer_params=ASK)
        reply = prefill.send("POST", "/v1/completions", request)
        assert reply.status == status, reply.body
    assert "--max-published-kv" in reply.error["message"]
    assert until(lambda: small.engines()["prefill-0"]["kv"]["in_use"] == 0, 10)

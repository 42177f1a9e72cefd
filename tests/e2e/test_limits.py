"""What does not fit, or comes too often, or takes too long."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.http import Reply
from tests.support.processes import until
from tests.support.reference import Reference

TINY = flags(kv_memory="320KiB", max_num_seqs=16, max_batched_tokens=64)
"""20 blocks of 16 tokens for this model."""


def settled(deployment: Deployment) -> bool:
    return all(e["kv"]["free"] + e["kv"]["cached"] == e["kv"]["blocks"] for e in deployment.engines().values())


@pytest.fixture(scope="module", params=["1", "0"], ids=["prefill and decode engines", "a mixed engine"])
def tiny(request: pytest.FixtureRequest, serve: Serve) -> Deployment:
    return serve("qwen3", *TINY, "--prefill", request.param)


def test_requests_that_take_each_others_blocks_still_match(
    tiny: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    assert {engine["kv"]["blocks"] for engine in tiny.engines().values()} == {20}
    prompts = [prompt_of(60, seed=50 + i) for i in range(6)]
    with ThreadPoolExecutor(6) as threads:
        replies = list(threads.map(lambda prompt: tiny.http.complete(prompt, max_tokens=100, ignore_eos=True), prompts))
    for prompt, reply in zip(prompts, replies, strict=True):
        assert reply.token_ids == reference_of("qwen3")(prompt, 100)
    assert until(lambda: sum(e["counters"]["preemptions"] for e in tiny.engines().values()) > 0, 10)
    assert sum(reply.how["recomputations"] for reply in replies) > 0
    assert until(lambda: settled(tiny), 10)


def test_a_prompt_that_no_engine_has_memory_for_is_told_how_much_it_needs(tiny: Deployment) -> None:
    reply = tiny.http.complete(prompt_of(400), max_tokens=4)
    assert reply.status == 400
    for part in ("400 tokens", "needs 2", "KV blocks of 16 tokens", "has 20", "--kv-memory"):
        assert part in reply.error["message"]
    assert until(lambda: settled(tiny), 15), tiny.engines()


def test_an_answer_that_outgrows_the_memory_is_told_how_much_it_needs(tiny: Deployment) -> None:
    reply = tiny.http.complete(prompt_of(200), max_tokens=800, ignore_eos=True)
    assert reply.status == 400
    for part in ("200 tokens", "need 21 KV blocks", "has 20", "--kv-memory"):
        assert part in reply.error["message"]
    assert until(lambda: settled(tiny), 10), tiny.engines()


def test_too_long_a_prompt_is_refused_with_both_lengths(tiny: Deployment) -> None:
    reply = tiny.http.complete(prompt_of(1024), max_tokens=1)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert reply.error["message"].count("1024") == 2


def test_a_full_queue_is_said_at_once_and_harms_nobody_who_is_in_it(
    serve: Serve, reference_of: Callable[[str], Reference]
) -> None:
    narrow = serve("qwen3", *flags(kv_memory="16MiB", max_num_seqs=1, max_batched_tokens=64, max_waiting=2))
    prompts = [prompt_of(20, seed=60 + i) for i in range(16)]
    with ThreadPoolExecutor(16) as threads:
        replies: list[Reply] = list(
            threads.map(lambda prompt: narrow.http.complete(prompt, max_tokens=120, ignore_eos=True), prompts)
        )
    refused = [reply for reply in replies if reply.status == 503]
    assert refused
    for reply in refused:
        assert int(reply.headers["retry-after"]) >= 1
        assert reply.error["code"] == "overloaded"
    answered = [(prompt, reply) for prompt, reply in zip(prompts, replies, strict=True) if reply.status != 503]
    assert answered
    for prompt, reply in answered:
        assert reply.token_ids == reference_of("qwen3")(prompt, 120)
    assert until(lambda: settled(narrow), 15), narrow.engines()


@pytest.mark.parametrize("prefill", ["1", "0"])
def test_a_request_that_takes_too_long_ends_with_504_and_gives_its_blocks_back(prefill: str, serve: Serve) -> None:
    hasty = serve("qwen3", *flags(kv_memory="16MiB", request_timeout=0.4), "--prefill", prefill)
    reply = hasty.http.complete(prompt_of(20), max_tokens=1000, ignore_eos=True)
    assert (reply.status, reply.error["code"]) == (504, "timed_out")
    assert until(lambda: settled(hasty), 15), hasty.engines()

"""Clients that go away leave nothing behind: no blocks, no requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.http import completion, hang_up
from tests.support.processes import until, until_it_stays
from tests.support.reference import Reference

PATIENCE = 20.0
LONG = {"max_tokens": 600, "ignore_eos": True}


@pytest.fixture(scope="module", params=["nixl", "tcp"])
def split(request: pytest.FixtureRequest, serve: Serve) -> Deployment:
    options = flags(kv_memory="32MiB", max_batched_tokens=64, max_num_seqs=32, connector=request.param)
    return serve("qwen3", *options)


def unsettled(deployment: Deployment) -> dict[str, object]:
    """Engines that still have something of a request, and what."""
    found: dict[str, object] = {}
    for name, engine in deployment.engines().items():
        kv, requests = engine["kv"], engine["requests"]
        if kv["free"] + kv["cached"] != kv["blocks"] or any(requests.values()):
            found[name] = (kv, requests)
    return found


def assert_settles(deployment: Deployment) -> None:
    # Engines are seen as their last heartbeat told; the one before the abort must not count.
    assert until_it_stays(lambda: not unsettled(deployment), PATIENCE), unsettled(deployment)


def assert_answers(deployment: Deployment, reference: Reference, seed: int) -> None:
    prompt = prompt_of(70, seed)
    reply = deployment.http.complete(prompt, max_tokens=8, ignore_eos=True)
    assert reply.token_ids == reference(prompt, 8)
    assert reply.how["disaggregated"]


def busy(deployment: Deployment) -> bool:
    return any(sum(engine["requests"].values()) for engine in deployment.engines().values())


def test_a_client_that_leaves_amid_a_stream_gives_all_blocks_back(
    split: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    stream = split.http.stream(prompt_of(200, seed=30), **LONG)
    events = iter(stream)
    for _ in range(5):
        next(events)
    assert until(lambda: "decode-0" in unsettled(split), PATIENCE)
    stream.close()
    assert_settles(split)
    assert_answers(split, reference_of("qwen3"), seed=31)


def test_a_client_that_leaves_before_its_answer_is_whole_gives_all_blocks_back(
    split: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    connection = split.http.start("POST", "/v1/completions", completion(prompt_of(200, seed=32), **LONG))
    assert until(lambda: busy(split), PATIENCE)
    hang_up(connection.sock)
    assert_settles(split)
    assert_answers(split, reference_of("qwen3"), seed=33)


def test_clients_that_leave_at_any_moment_leave_nothing_behind(
    split: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    """Some before their first token, some amid the prefill of a long prompt, some amid a stream."""

    def ask_and_leave(number: int) -> None:
        chance = random.Random(number)
        prompt = prompt_of(chance.randint(1, 400), seed=100 + number)
        stream = number % 3 != 0
        connection = split.http.start("POST", "/v1/completions", completion(prompt, stream=stream, **LONG))
        connection.sock.settimeout(chance.choice([0.001, 0.02, 0.05, 0.1, 0.2, 0.4]))
        try:
            while connection.sock.recv(512):
                if chance.random() < 0.2:
                    break
        except TimeoutError:
            pass
        hang_up(connection.sock)

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(ask_and_leave, range(30)))
    assert_settles(split)
    assert_answers(split, reference_of("qwen3"), seed=34)


def test_one_client_that_leaves_disturbs_no_other(split: Deployment, reference_of: Callable[[str], Reference]) -> None:
    load = [(prompt_of(20 + 30 * i, seed=200 + i), 40) for i in range(6)]
    with ThreadPoolExecutor(8) as threads:
        answers = [
            threads.submit(lambda p, n: split.http.stream(p, max_tokens=n, ignore_eos=True).token_ids(), prompt, tokens)
            for prompt, tokens in load
        ]
        for number in range(6):
            stream = split.http.stream(prompt_of(50, seed=300 + number), **LONG)
            next(iter(stream))
            stream.close()
    for (prompt, tokens), answer in zip(load, answers, strict=True):
        assert answer.result() == reference_of("qwen3")(prompt, tokens)
    assert_settles(split)

"""Clients that name prefill engines that are not there take nothing from those that are."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.http import completion
from tests.support.processes import until
from tests.support.reference import Reference

REQUESTS = 2000
MAX_SESSIONS = 65
"""64 with engines that clients named, and the one with the engine that the router named."""


@pytest.fixture(scope="module")
def split(serve: Serve) -> Deployment:
    return serve("qwen3", *flags(kv_memory="16MiB", connector="tcp", lease_ttl=2, max_waiting=4096))


def invented(number: int, port: int) -> dict[str, Any]:
    return {
        "do_remote_prefill": True,
        "remote_engine_id": f"invented-{number}",
        "remote_request_id": "r",
        "remote_host": "127.0.0.1",
        "remote_port": port,
    }


def sockets_of(pid: int) -> int:
    links = [os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")]
    return sum(link.startswith("socket:") for link in links)


@pytest.mark.timeout(300)
def test_sessions_heartbeats_and_sockets_stay_bounded_and_real_engines_are_read_from(
    split: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    decode, prefill = split.engine("decode-0"), split.engine("prefill-0")
    pid = split.engines()["decode-0"]["ranks"][0]["pid"]
    # One that refuses, and one that takes the connection and never answers: the engine's own API.
    ports = [1, int(split.engines()["decode-0"]["http_address"].rpartition(":")[2])]
    before, most_sockets, most_peers = sockets_of(pid), 0, 0

    def lie(number: int) -> int:
        request = completion([1 + number % 200, 2, 3], max_tokens=1) | {
            "kv_transfer_params": invented(number, ports[number % 2])
        }
        return decode.send("POST", "/v1/completions", request).status

    with ThreadPoolExecutor(256) as pool:
        lies = [pool.submit(lie, number) for number in range(REQUESTS)]
        assert until(lambda: len(split.engines()["decode-0"]["peers"]) == MAX_SESSIONS, 30)
        for seed in range(8):
            prompt = prompt_of(70, seed=2000 + seed)
            request = completion(prompt, max_tokens=4, ignore_eos=True)
            asked = request | {"max_tokens": 1, "kv_transfer_params": {"do_remote_decode": True}}
            params = prefill.send("POST", "/v1/completions", asked).json["kv_transfer_params"]
            reply = decode.send("POST", "/v1/completions", request | {"kv_transfer_params": params})
            assert reply.token_ids == reference_of("qwen3")(prompt, 4)
            assert reply.how["disaggregated"], reply.how
            routed = split.http.complete(prompt, max_tokens=4, ignore_eos=True)
            assert routed.token_ids == reference_of("qwen3")(prompt, 4)
            most_sockets = max(most_sockets, sockets_of(pid))
            most_peers = max(most_peers, len(split.engines()["decode-0"]["peers"]))
        assert {done.result() for done in lies} <= {200, 429, 503}  # computed here, or too many at once
    assert most_peers <= MAX_SESSIONS
    assert most_sockets <= before + 4 * MAX_SESSIONS
    assert until(lambda: split.engines()["decode-0"]["kv"]["in_use"] == 0, 10)

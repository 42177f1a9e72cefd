"""Foreign PD proxies drive the engines' own APIs with `kv_transfer_params`, as vLLM's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.http import Reply, completion
from tests.support.processes import until
from tests.support.reference import Reference

ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""What vLLM's proxies send to the prefill engine."""


@pytest.fixture(scope="module", params=["nixl", "tcp"])
def split(request: pytest.FixtureRequest, serve: Serve) -> Deployment:
    return serve("qwen3", *flags(kv_memory="16MiB", max_batched_tokens=64, lease_ttl=2, connector=request.param))


def prefilled(deployment: Deployment, request: dict[str, Any]) -> Reply:
    """The proxy's first leg."""
    leg = request | {"max_tokens": 1, "stream": False, "kv_transfer_params": ASK}
    return deployment.engine("prefill-0").send("POST", "/v1/completions", leg, {"X-Request-Id": "proxied"})


def test_a_proxy_gets_the_tokens_of_a_single_engine(
    split: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    for length in (1, 15, 16, 17, 150):
        prompt = prompt_of(length, seed=40)
        request = completion(prompt, max_tokens=20, ignore_eos=True)
        params = prefilled(split, request).json["kv_transfer_params"]
        assert params["do_remote_prefill"]
        assert params["remote_engine_id"] == "prefill-0"
        reply = split.engine("decode-0").send(
            "POST", "/v1/completions", request | {"kv_transfer_params": params}, {"X-Request-Id": "proxied"}
        )
        assert reply.token_ids == reference_of("qwen3")(prompt, 20), f"prompt of {length} tokens"
        if length > 1:
            assert reply.how["disaggregated"], reply.how
            assert reply.how["transport"] == split.engines()["decode-0"]["connector"]


def test_a_proxy_may_stream(split: Deployment, reference_of: Callable[[str], Reference]) -> None:
    prompt = prompt_of(70, seed=41)
    request = completion(prompt, max_tokens=20, ignore_eos=True)
    params = prefilled(split, request).json["kv_transfer_params"]
    stream = split.engine("decode-0").stream(prompt, max_tokens=20, ignore_eos=True, kv_transfer_params=params)
    assert stream.token_ids() == reference_of("qwen3")(prompt, 20)


def test_blocks_stay_until_the_decode_engine_has_read_them_and_no_longer(split: Deployment) -> None:
    request = completion(prompt_of(70, seed=42), max_tokens=4, ignore_eos=True)
    params = prefilled(split, request).json["kv_transfer_params"]
    assert until(lambda: split.engines()["prefill-0"]["kv"]["leased"] == len(params["remote_block_ids"]) == 5, 10)
    split.engine("decode-0").send("POST", "/v1/completions", request | {"kv_transfer_params": params})
    assert until(lambda: split.engines()["prefill-0"]["kv"]["leased"] == 0, 10)


def test_a_host_outside_allow_peers_is_refused(split: Deployment) -> None:
    request = completion(prompt_of(70, seed=43), max_tokens=4, ignore_eos=True)
    params = prefilled(split, request).json["kv_transfer_params"]
    reply = split.engine("decode-0").send(
        "POST", "/v1/completions", request | {"kv_transfer_params": params | {"remote_host": "192.0.2.7"}}
    )
    assert reply.status == 400
    assert "192.0.2.7" in reply.error["message"]
    assert "--allow-peers" in reply.error["message"]


def test_kv_of_an_engine_that_is_not_there_is_computed_here(
    split: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    prompt = prompt_of(70, seed=44)
    request = completion(prompt, max_tokens=8, ignore_eos=True)
    params = prefilled(split, request).json["kv_transfer_params"] | {"remote_request_id": "nobody-knows-it"}
    reply = split.engine("decode-0").send("POST", "/v1/completions", request | {"kv_transfer_params": params})
    assert reply.token_ids == reference_of("qwen3")(prompt, 8)
    assert not reply.how["disaggregated"]
    assert reply.how["recomputations"] == 1


def test_a_router_does_not_take_them(split: Deployment) -> None:
    reply = split.http.complete(prompt_of(5), kv_transfer_params=ASK)
    assert (reply.status, reply.error["param"]) == (400, "kv_transfer_params")


def test_kv_of_one_prompt_is_never_used_for_another(
    split: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    """Neither in the answer nor, through the prefix cache, in any later one."""
    secret, asked = prompt_of(70, seed=44), prompt_of(70, seed=45)
    params = prefilled(split, completion(secret, max_tokens=4, ignore_eos=True)).json["kv_transfer_params"]
    request = completion(asked, max_tokens=8, ignore_eos=True)
    mixed_up = split.engine("decode-0").send("POST", "/v1/completions", request | {"kv_transfer_params": params})
    assert mixed_up.token_ids == reference_of("qwen3")(asked, 8)
    assert not mixed_up.how["disaggregated"]
    assert "another prompt" in mixed_up.how["reason"]
    later = split.http.send("POST", "/v1/completions", request)
    assert later.token_ids == reference_of("qwen3")(asked, 8)


def test_kv_that_was_read_already_is_computed_again_and_the_answer_says_why(
    split: Deployment, reference_of: Callable[[str], Reference]
) -> None:
    prompt = prompt_of(70, seed=46)
    request = completion(prompt, max_tokens=8, ignore_eos=True)
    params = prefilled(split, request).json["kv_transfer_params"]
    decode = split.engine("decode-0")
    for _ in range(2):
        reply = decode.send("POST", "/v1/completions", request | {"kv_transfer_params": params})
        assert reply.token_ids == reference_of("qwen3")(prompt, 8)
    assert not reply.how["disaggregated"]
    assert reply.how["reason"]

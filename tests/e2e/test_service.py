"""The API of a running deployment, beside generating: health, metrics, engines, request ids, the official client."""

from __future__ import annotations

import re
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.http import completion
from tests.support.processes import until

GREEDY_CHAT: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def split(serve: Serve) -> Deployment:
    return serve("qwen3", *flags(kv_memory="16MiB", api_key="open-sesame", served_model_name="tiny"))


@pytest.fixture(scope="module")
def client(split: Deployment) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{split.http.url}/v1", api_key="open-sesame", max_retries=0)


def test_the_router_is_healthy_once_the_command_says_that_it_serves(split: Deployment) -> None:
    assert (split.http.get("/health").status, split.http.get("/health").json["status"]) == (200, "ok")


def test_the_panel_and_the_engines_lines_are_shown(split: Deployment) -> None:
    assert f"tiny is served at {split.http.url}/v1" in split.log
    for name in ("prefill-0", "decode-0"):
        assert re.search(
            rf"^{name} ready: .* engine {name}, tp 1, pp 1, nixl, \d+ blocks of 16 tokens", split.log, re.M
        )


def test_metrics_parse_and_count(split: Deployment, client: openai.OpenAI) -> None:
    client.completions.create(model="tiny", prompt="Sort: hello", max_tokens=5, extra_body={"ignore_eos": True})

    def samples(url: str) -> dict[str, float]:
        found: dict[str, float] = {}
        text = (split.http if url == "router" else split.engine(url)).get("/metrics").body.decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found[sample.name] = found.get(sample.name, 0) + sample.value
        return found

    assert samples("router")["tandem_engine_ready"] == 2
    assert until(lambda: samples("router")["tandem_engine_kv_bytes_total"] > 0, 10)
    assert samples("router")["tandem_engine_kv_failures_total"] == 0
    assert samples("decode-0")["tandem_engine_ready"] == 1


def test_each_engine_tells_of_itself_as_the_router_tells_of_it(split: Deployment) -> None:
    for name, known in split.engines().items():
        told = split.engine(name).get("/tandem/engine").json
        assert known["state"] == "ready"
        assert (told["engine_id"], told["role"]) == (name, name.removesuffix("-0"))
        for same in ("incarnation", "fingerprint", "tp", "pp", "nnodes", "connector", "model", "ranks"):
            assert told[same] == known[same], same
        [rank] = told["ranks"]
        assert (rank["rank"], rank["tp_rank"], rank["pp_rank"]) == (0, 0, 0)
        assert (rank["engine_id"], rank["incarnation"]) == (name, told["incarnation"])
        assert set(told["kv"]) == {"block_size", "blocks", "free", "cached", "leased", "in_use"}
        assert set(told["requests"]) == {"waiting", "waiting_for_kv", "running"}


def test_the_decode_engine_has_shaken_hands_before_the_first_request(split: Deployment) -> None:
    engines = split.engines()
    [peer] = engines["decode-0"]["peers"]
    assert (peer["engine_id"], peer["state"], peer["error"]) == ("prefill-0", "ready", None)
    assert peer["incarnation"] == engines["prefill-0"]["incarnation"]
    assert engines["prefill-0"]["fingerprint"] == engines["decode-0"]["fingerprint"]


def test_a_request_id_is_taken_over_and_is_in_the_log(split: Deployment) -> None:
    headers = {"X-Request-Id": "who-am-i-7", "Authorization": "Bearer open-sesame"}
    reply = split.http.send("POST", "/v1/completions", completion(prompt_of(3), max_tokens=2), headers)
    assert (reply.status, reply.headers["x-request-id"]) == (200, "who-am-i-7")
    assert until(lambda: "who-am-i-7" in split.log, 5)


def test_the_key_is_asked_for_everywhere(split: Deployment) -> None:
    for http in (split.http, split.engine("decode-0")):
        reply = http.complete(prompt_of(3))
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")


def test_an_unknown_field_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="colour"):
        client.completions.create(model="tiny", prompt="a", extra_body={"colour": "red"})


def test_another_model_is_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-9"):
        client.completions.create(model="gpt-9", prompt="a")


def test_the_official_client_lists_the_model(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.max_model_len) == ("tiny", 1024)  # type: ignore[attr-defined]


def test_the_official_client_completes_streaming_or_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Reverse: abc", "temperature": 0, "max_tokens": 12}
    whole = client.completions.create(**asked, extra_body={"ignore_eos": True})
    events = list(
        client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}, extra_body={"ignore_eos": True}
        )
    )
    assert "".join(choice.text for event in events for choice in event.choices) == whole.choices[0].text
    assert whole.usage is not None
    assert events[-1].usage is not None
    assert (whole.usage.completion_tokens, whole.usage.prompt_tokens) == (12, len("Reverse: abc"))
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    assert events[-1].tandem["disaggregated"]


def test_the_official_client_chats_streaming_or_not(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Sort: dcba"}], "logprobs": True}
    whole = client.chat.completions.create(**asked, **GREEDY_CHAT)
    events = list(client.chat.completions.create(**asked, **GREEDY_CHAT, stream=True))
    said = "".join(choice.delta.content or "" for event in events for choice in event.choices)
    assert said == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == events[-1].choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == 12
    assert whole.tandem["prefill_engine"] == "prefill-0"

"""Log-probabilities of prompts, as evaluation harnesses ask for them, against those that transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.http import Http

SMALL = {"kv_memory": "32MiB", "max_batched_tokens": 64, "max_num_seqs": 32}
SHAPES = {
    "prefill and decode apart": flags(**SMALL),
    "four ranks for the prompt": flags(**SMALL, prefill_tp=2, prefill_pp=2),
}
TOP = 3
CLOSE = 0.02  # float32 here and there, in other orders


@pytest.fixture(scope="module", params=SHAPES)
def split(request: pytest.FixtureRequest, serve: Serve) -> Deployment:
    return serve("qwen3", *SHAPES[request.param])


@pytest.fixture(scope="module")
def expected(folder_of: Callable[[str], Path]) -> Callable[[list[int]], Any]:
    """Log-probabilities [prompt less its first token, vocabulary]."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder_of("qwen3"), dtype=torch.float32).eval()

    def compute(prompt: list[int]) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)

    return compute


def ask(http: Http, prompt: list[int], **fields: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": TOP, "echo": True} | fields
    return http.send("POST", "/v1/completions", body).choice


def check(logprobs: dict[str, Any], prompt: list[int], values: Any) -> None:
    assert (logprobs["token_logprobs"][0], logprobs["top_logprobs"][0]) == (None, None)
    own = [values[place, token].item() for place, token in enumerate(prompt[1:])]
    assert logprobs["token_logprobs"][1 : len(prompt)] == pytest.approx(own, abs=CLOSE)
    best = values.topk(TOP).values.tolist()
    for told, computed in zip(logprobs["top_logprobs"][1 : len(prompt)], best, strict=True):
        assert sorted(told.values(), reverse=True)[:TOP] == pytest.approx(computed, abs=CLOSE)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_an_echoed_prompt_is_scored_whatever_its_chunks_and_whatever_is_cached(
    split: Deployment, expected: Callable[[list[int]], Any], length: int
) -> None:
    prompt = prompt_of(length, seed=50)
    values = expected(prompt)
    assert split.http.complete(prompt, max_tokens=1).status == 200  # it is in the prefix caches from here on
    for http in (split.http, split.http, split.engine("prefill-0"), split.engine("decode-0")):
        choice = ask(http, prompt)
        assert len(choice["logprobs"]["tokens"]) == length + 1
        check(choice["logprobs"], prompt, values)


def test_a_prompt_alone_has_no_output_and_a_stream_the_same(
    split: Deployment, expected: Callable[[list[int]], Any]
) -> None:
    prompt = prompt_of(100, seed=51)
    values = expected(prompt)
    whole = ask(split.http, prompt, max_tokens=0)
    assert (len(whole["logprobs"]["tokens"]), whole["finish_reason"]) == (100, "length")
    check(whole["logprobs"], prompt, values)
    for size in (0, 5):
        events = list(split.http.stream(prompt, max_tokens=size, logprobs=TOP, echo=True, ignore_eos=True))
        choices = [event["choices"][0] for event in events]
        assert sum(len(choice["logprobs"]["tokens"]) for choice in choices) == 100 + size
        check(choices[0]["logprobs"], prompt, values)


def test_prompts_of_a_batch_and_those_of_others_do_not_mix(
    split: Deployment, expected: Callable[[list[int]], Any]
) -> None:
    prompts = [prompt_of(30 + 11 * index, seed=52) for index in range(8)]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 3, "prompt_logprobs": TOP, "ignore_eos": True}
    choices = split.http.send("POST", "/v1/completions", body).json["choices"]
    for prompt, choice in zip(prompts, choices, strict=True):
        values = expected(prompt)
        assert choice["prompt_logprobs"][0] is None
        for place, told in enumerate(choice["prompt_logprobs"][1:]):
            token = prompt[place + 1]
            own = told[str(token)]
            assert own["logprob"] == pytest.approx(values[place, token].item(), abs=CLOSE)
            better = int((values[place] > values[place, token] + CLOSE).sum())
            worse = int((values[place] < values[place, token] - CLOSE).sum())
            assert better < own["rank"] <= values.shape[-1] - worse
            assert TOP <= len(told) <= TOP + 1


def test_a_chat_has_them_too(split: Deployment) -> None:
    body = {"messages": [{"role": "user", "content": "Sort: ba"}], "max_tokens": 1, "prompt_logprobs": 0}
    for extra in ({}, {"return_token_ids": True}):
        reply = split.http.send("POST", "/v1/chat/completions", body | extra)
        assert reply.status == 200, reply.body
        told = reply.json["prompt_logprobs"]
    assert [list(one) for one in told[1:]] == [[str(token)] for token in reply.json["prompt_token_ids"][1:]]

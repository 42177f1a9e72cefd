"""Prompts in the answer: echoed, and with log-probabilities."""

from typing import Any

import pytest

from tandem.api.backend import TokenDelta, TokenRequest
from tandem.api.tokenizer import Tokenizer
from tandem.wire.messages import TokenLogprobs
from tests.api.conftest import START, Api, details, ids


def scored(request: TokenRequest) -> list[TokenDelta]:
    """An engine's answer: place i of the prompt has -i, and the most likely one was token 0."""
    count = len(request.token_ids)
    scores = [TokenLogprobs(-float(place), [(0, -0.5), (1, -1.5)], place + 2) for place in range(1, count)]
    first = [TokenLogprobs(-7.0, [(0, -0.5), (1, -1.5)])] if request.sampling.logprobs is not None else None
    return [TokenDelta(ids("!"), first, "length", details=details(), prompt_logprobs=scores)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["köln the", ids("köln the")])
def test_an_echoed_prompt_has_logprobs_of_its_own(api: Api, prompt: Any, stream: bool) -> None:
    api.backend.script = scored
    reply = api.complete(prompt=prompt, echo=True, logprobs=2, max_tokens=1, stream=stream)
    choice = (reply.events[0] if stream else reply.json)["choices"][0]
    found, count = choice["logprobs"], len(ids("köln the"))
    assert choice["text"] == "köln the!"
    assert found["token_logprobs"] == [None, *(-float(place) for place in range(1, count)), -7.0]
    assert [found["top_logprobs"][0], len(found["top_logprobs"]), len(found["tokens"])] == [None, count + 1, count + 1]
    assert [len(one) for one in found["top_logprobs"][1:]] == [
        2 if token in (0, 1) else 3 for token in (*ids("köln the")[1:], *ids("!"))
    ]
    assert [offset for offset in found["text_offset"]] == sorted(found["text_offset"])
    assert found["text_offset"][-1] == len("köln the")
    assert api.backend.requests[0].sampling.prompt_logprobs == 2


def test_prompt_logprobs_alone_are_vllms(api: Api) -> None:
    api.backend.script = scored
    choice = api.complete(prompt="the", prompt_logprobs=1, max_tokens=1).json["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert (first, len(others)) == (None, len(ids("the")) - 1)
    for place, told in enumerate(others, 1):
        token = str(ids("the")[place])
        assert told[token] == {"logprob": -place, "rank": place + 2, "decoded_token": told[token]["decoded_token"]}
        assert told["0"]["rank"] == 1
    assert choice["logprobs"] is None
    assert "prompt_logprobs" not in api.complete(max_tokens=1).json["choices"][0]


@pytest.mark.parametrize("stream", [False, True])
def test_a_length_of_0_shows_the_prompt_alone(api: Api, stream: bool) -> None:
    api.backend.script = scored
    reply = api.complete(prompt="the", echo=True, logprobs=0, max_tokens=0, stream=stream, return_token_ids=True)
    choice = (reply.events[0] if stream else reply.json)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["token_ids"]) == ("the", "length", [])
    assert len(choice["logprobs"]["tokens"]) == len(ids("the"))
    assert api.backend.requests[0].sampling.max_tokens == 1
    assert stream or reply.json["usage"]["completion_tokens"] == 0


def test_a_foreign_proxys_request_brings_no_prompt_logprobs(engine_api: Api) -> None:
    for fields in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}):
        reply = engine_api.complete(kv_transfer_params={"do_remote_decode": True}, **fields)
        assert (reply.status, reply.error["param"]) == (400, "prompt_logprobs")


def test_an_echoed_prompt_of_token_ids_is_decoded_once_for_all_of_a_stream(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, decoded = ids("the quick brown fox"), list[list[int]]()
    decode = Tokenizer.decode

    def counting(self: Tokenizer, token_ids: list[int], **options: bool) -> str:
        decoded.append(token_ids)
        return decode(self, token_ids, **options)

    def answer(request: TokenRequest) -> list[TokenDelta]:
        scores = [TokenLogprobs(-1.0, []) for _ in prompt[1:]]
        first = TokenDelta(ids("a"), [TokenLogprobs(-1.0, [])], None, prompt_logprobs=scores)
        others = [TokenDelta(ids(one), [TokenLogprobs(-1.0, [])], None) for one in "bcde"]
        return [first, *others, TokenDelta(ids("f"), [TokenLogprobs(-1.0, [])], "length", details=details())]

    api.backend.script = answer
    monkeypatch.setattr(Tokenizer, "decode", counting)
    events = api.complete(prompt=prompt, echo=True, logprobs=0, stream=True).events
    assert decoded.count(prompt) == 1
    text = "the quick brown fox"
    assert [event["choices"][0]["logprobs"]["text_offset"][-1] for event in events[:-1]] == [
        len(text) + i for i in range(6)
    ]


@pytest.mark.parametrize(("skips", "shown"), [(True, "hello"), (False, f"{START}hello")])
def test_an_echoed_prompt_of_token_ids_shows_special_tokens_where_the_answer_does(
    api: Api, skips: bool, shown: str
) -> None:
    api.backend.script = scored
    prompt = ids(f"{START}hello")
    reply = api.complete(prompt=prompt, echo=True, logprobs=0, max_tokens=1, skip_special_tokens=skips)
    choice = reply.json["choices"][0]
    assert choice["text"] == f"{shown}!"
    assert choice["logprobs"]["text_offset"][-1] == len(shown)
    assert choice["logprobs"]["text_offset"][1] == (0 if skips else len(START))

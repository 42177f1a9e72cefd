import json
from typing import Any

import pytest

from tandem.api.openai import ChatBody, CompletionBody
from tandem.api.parsing import NOT_SERVED, WITHOUT_EFFECT, kv_transfer_params, parse, sampling_params
from tandem.errors import InvalidRequest
from tandem.wire.messages import KvTransferParams

USER = {"role": "user", "content": "hello"}


def completion(**fields: Any) -> CompletionBody:
    return parse(json.dumps({"prompt": "x"} | fields).encode(), CompletionBody)


def chat(**fields: Any) -> ChatBody:
    return parse(json.dumps({"messages": [USER]} | fields).encode(), ChatBody)


def refusal(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        sampling_params(completion(**fields), 16, None)
    return caught.value


def test_an_unknown_field_is_refused_by_name() -> None:
    error = refusal(temprature=1)
    assert (error.param, error.code) == ("temprature", "unknown_parameter")
    assert "temprature" in str(error)


@pytest.mark.parametrize("name", sorted(NOT_SERVED))
def test_a_field_that_is_not_served_is_refused_by_name_unless_it_asks_for_nothing(name: str) -> None:
    error = refusal(**{name: {"something": 1}})
    assert (error.param, error.code) == (name, "unsupported_parameter")
    assert "not supported" in str(error)
    for neutral in (None, *NOT_SERVED[name]):
        assert completion(**{name: neutral}).prompt == "x"


@pytest.mark.parametrize("value", [1, "false", 0, True])
def test_only_the_very_value_that_asks_for_nothing_is_taken(value: Any) -> None:
    assert refusal(use_beam_search=value).param == "use_beam_search"


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
@pytest.mark.parametrize("value", [None, True, 7, "high", {"a": "b"}, {str(i): "x" * 500 for i in range(16)}, [{}]])
def test_a_field_that_asks_nothing_of_the_model_is_taken_with_any_value(name: str, value: Any) -> None:
    assert completion(**{name: value}) == completion()
    assert chat(**{name: value}) == chat()


def test_fields_are_served_refused_or_without_effect_and_only_one_of_these() -> None:
    names = [*CompletionBody.__struct_fields__, *NOT_SERVED, *WITHOUT_EFFECT]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("wrong", ["", "x" * 257, 7, ["a"]])
def test_a_cache_salt_is_a_short_text(wrong: Any) -> None:
    assert refusal(cache_salt=wrong).param == "cache_salt"
    assert completion(cache_salt="x" * 256).cache_salt == "x" * 256


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"x": 1}}, "stream_options.x"),
        ({"ignore_eos": 1}, "ignore_eos"),
        ({"user": 7}, "user"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1.5]}, "prompt[1]"),
    ],
)
def test_a_wrong_value_is_refused_with_the_field_at_fault(fields: dict[str, Any], param: str) -> None:
    error = refusal(**fields)
    assert error.param == param
    assert str(error).startswith(param)


def test_a_refusal_says_what_was_expected_and_what_came() -> None:
    assert "<= 1" in str(refusal(top_p=1.5))
    assert "got 1.5" in str(refusal(top_p=1.5))


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidRequest, match="prompt: this field is missing") as caught:
        parse(b"{}", CompletionBody)
    assert caught.value.param == "prompt"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b'{"prompt": "\xff"}'])
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest, match="the body"):
        parse(body, CompletionBody)


def test_a_number_that_no_float_holds_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="out of range"):
        parse(b'{"prompt": "x", "top_p": 1e999}', CompletionBody)


def test_null_is_the_same_as_nothing() -> None:
    nulls = {name: None for name in CompletionBody.__struct_fields__ if name not in ("prompt", "seed")}
    assert sampling_params(completion(**nulls, seed=1), 16, None) == sampling_params(completion(seed=1), 16, None)


def test_defaults_are_openais() -> None:
    found = sampling_params(completion(), 16, None)
    assert (found.temperature, found.top_p, found.top_k, found.min_p, found.logprobs) == (1.0, 1.0, 0, 0.0, None)


def test_every_sampling_field_arrives() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2}
    more = {"presence_penalty": 0.2, "frequency_penalty": 0.3, "ignore_eos": True, "stop_token_ids": [4], "seed": 7}
    found = sampling_params(completion(**fields, **more, logit_bias={"12": -100}), 16, 3)
    assert {name: getattr(found, name) for name in fields | more} == fields | more
    assert (found.logit_bias, found.max_tokens, found.logprobs) == ({12: -100.0}, 16, 3)


@pytest.mark.parametrize("off", [-1, 0])
def test_top_k_can_be_turned_off_in_both_ways(off: int) -> None:
    assert sampling_params(completion(top_k=off), 16, None).top_k == 0


def test_without_a_seed_requests_differ_and_any_seed_of_openais_is_taken() -> None:
    assert sampling_params(completion(), 16, None).seed != sampling_params(completion(), 16, None).seed
    assert sampling_params(completion(seed=-5), 16, None) == sampling_params(completion(seed=-5), 16, None)


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ({"role": "function", "content": "x", "name": "f"}, "function"),
        ({"role": "boss", "content": "x"}, "boss"),
        ({"role": "user"}, "content"),
        ({"role": "user", "content": None}, "content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "tool_calls"),
        ({"role": "user", "content": "x", "colour": 1}, "colour"),
        (7, "messages[0]"),
    ],
)
def test_a_message_that_cannot_be_shown_to_the_model_is_refused(message: Any, word: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(messages=[message])
    assert word in str(caught.value)
    assert str(caught.value.param).startswith("messages")


def test_an_answer_of_ours_can_be_sent_back_as_the_official_client_writes_it() -> None:
    answer: dict[str, Any] = {
        "role": "assistant",
        "content": "x",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
        "audio": None,
    }
    assert chat(messages=[USER, answer, USER]).messages[1].content == "x"


def test_a_proxys_kv_parameters_are_taken_with_nulls_and_strange_keys() -> None:
    given = {
        "do_remote_decode": True,
        "do_remote_prefill": None,
        "remote_block_ids": None,
        "remote_engine_id": "e",
        "x": 1,
    }
    assert kv_transfer_params(given) == KvTransferParams(do_remote_decode=True, remote_engine_id="e")


@pytest.mark.parametrize("wrong", [{"remote_port": 0}, {"remote_port": "1"}, {"remote_block_ids": [-1]}])
def test_kv_parameters_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        kv_transfer_params(wrong)
    assert caught.value.param == "kv_transfer_params"


def test_seed_0_is_a_seed_and_a_server_may_have_one_for_requests_that_bring_none() -> None:
    assert sampling_params(completion(seed=0), 16, None, 7).seed == 0
    assert sampling_params(completion(), 16, None, 7).seed == 7
    assert sampling_params(completion(), 16, None, 0).seed == 0


@pytest.mark.parametrize("body", [b'{"prompt":0.5,"\xff":1}', b'{"n":"x","user":"\xff"}'])
def test_a_wrong_field_beside_bytes_that_are_no_text_is_refused_as_any_other(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(body, CompletionBody)

from typing import Any

import pytest

from tandem.api.backend import TokenDelta
from tandem.wire.messages import TokenLogprobs
from tests.api.conftest import END, EOS, MODEL, MODEL_LEN, START, Api, deltas, details, ids


def test_a_completion_has_openais_shape_and_tells_how_it_was_made(api: Api) -> None:
    reply = api.complete(model=MODEL, max_tokens=5)
    found = reply.json
    assert reply.status == 200
    assert (found["object"], found["model"], found["id"][:5]) == ("text_completion", MODEL, "cmpl-")
    assert found["choices"] == [
        {"index": 0, "text": "hello world", "finish_reason": "stop", "stop_reason": None, "logprobs": None}
    ]
    prompt, output = len(ids("hello")), len(ids("hello") + ids(" world")) + 1
    assert found["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert found["tandem"]["prefill_engine"] == "p0"
    assert found["tandem"]["prefix_tokens"] == {"p0": 3, "d0": 0}


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("hello", 1), (ids("hello"), 1), (["hello", "hello"], 2), ([ids("hello"), ids("hello")], 2)],
)
def test_a_prompt_may_be_text_or_token_ids_and_one_or_many(api: Api, prompt: Any, count: int) -> None:
    reply = api.complete(prompt=prompt)
    assert [choice["index"] for choice in reply.json["choices"]] == list(range(count))
    assert [request.token_ids for request in api.backend.requests] == [ids("hello")] * count
    assert reply.json["usage"]["prompt_tokens"] == count * len(ids("hello"))


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", [1]], [1, "a"], [[1], 2], [-1], [10**6], [[10**6]]])
def test_a_prompt_that_is_empty_mixed_or_outside_the_vocabulary_is_refused(api: Api, prompt: Any) -> None:
    reply = api.complete(prompt=prompt)
    assert (reply.status, reply.error["param"]) == (400, "prompt")
    assert not api.backend.requests


def test_a_prompt_that_is_too_long_is_refused_with_all_lengths(api: Api) -> None:
    reply = api.complete(prompt=[1] * 250, max_tokens=7)
    assert (reply.status, reply.error["code"]) == (400, "context_length_exceeded")
    assert all(number in reply.error["message"] for number in ("250", "7", str(MODEL_LEN)))
    assert api.complete(prompt=[1] * MODEL_LEN).status == 400
    assert not api.backend.requests


def test_without_max_tokens_there_are_sixteen_or_what_fits(api: Api) -> None:
    api.complete()
    api.complete(prompt=[1] * (MODEL_LEN - 3))
    assert [request.sampling.max_tokens for request in api.backend.requests] == [16, 3]


def test_n_choices_have_ids_and_seeds_of_their_own(api: Api) -> None:
    reply = api.send("POST", "/v1/completions", {"prompt": "hello", "n": 3, "seed": 7}, {"X-Request-Id": "abc"})
    assert [choice["index"] for choice in reply.json["choices"]] == [0, 1, 2]
    assert sorted((one.request_id, one.sampling.seed) for one in api.backend.requests) == [
        ("abc-0", 7),
        ("abc-1", 8),
        ("abc-2", 9),
    ]
    assert reply.json["usage"]["prompt_tokens"] == len(ids("hello"))
    assert reply.json["usage"]["completion_tokens"] == 3 * (len(ids("hello") + ids(" world")) + 1)
    assert [one["decode_engine"] for one in reply.json["tandem"]] == ["d0"] * 3


def test_echo_puts_the_prompt_before_the_text(api: Api) -> None:
    assert api.complete(prompt="say ", echo=True).json["choices"][0]["text"] == "say hello world"
    assert api.complete(prompt=ids("say "), echo=True).json["choices"][0]["text"] == "say hello world"
    events = api.complete(prompt="say ", echo=True, stream=True).events
    assert [event["choices"][0]["text"] for event in events[:-1]] == ["say hello", " world", ""]


def test_logprobs_have_one_entry_for_each_token(api: Api) -> None:
    h, w = ids("hello"), ids(" world")
    first = [TokenLogprobs(-0.5, [(i, -0.5), (w[0], -1.0)]) for i in h]
    second = [TokenLogprobs(float("-inf"), [(h[0], -0.1), (h[0] + 1, -2.0)]) for _ in w]
    api.backend.script = lambda request: [
        TokenDelta(h, first, details=details()),
        TokenDelta(w, second, finish_reason="length", details=details()),
    ]
    choice = api.complete(logprobs=2).json["choices"][0]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"] == "hello world"
    assert found["token_logprobs"] == [-0.5] * len(h) + [-9999.0] * len(w)
    assert [len(top) for top in found["top_logprobs"]] == [2] * len(h) + [3] * len(w)
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)
    assert api.backend.requests[0].sampling.logprobs == 2


def test_token_ids_of_prompt_and_output_come_when_asked_for(api: Api) -> None:
    choice = api.complete(return_token_ids=True).json["choices"][0]
    assert choice["prompt_token_ids"] == ids("hello")
    assert choice["token_ids"] == ids("hello") + ids(" world") + ids(EOS)
    events = api.complete(return_token_ids=True, stream=True).events[:-1]
    assert [event["choices"][0]["token_ids"] for event in events] == [ids("hello"), ids(" world"), ids(EOS)]
    assert [event["choices"][0].get("prompt_token_ids") for event in events] == [ids("hello"), None, None]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_over_several_tokens_ends_the_text_before_it_and_aborts_the_request(
    api: Api, stream: bool
) -> None:
    api.backend.script = lambda request: deltas("one tw", "o th", "ree", " four")
    reply = api.complete(stop=["nothing", "two three"], stream=stream)
    choices = [event["choices"][0] for event in (reply.events[:-1] if stream else [reply.json])]
    assert "".join(choice["text"] for choice in choices) == "one "
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "two three")
    assert api.backend.closed.wait(10)
    assert api.backend.aborted == [api.backend.requests[0].request_id]


def test_tokens_after_the_one_that_completes_a_stop_string_are_not_counted(api: Api) -> None:
    token_ids = ids("ab") + ids("xy") + ids("cd")
    api.backend.script = lambda request: [TokenDelta(token_ids, finish_reason="length", details=details())]
    reply = api.complete(stop="xy", return_token_ids=True).json
    assert reply["choices"][0]["text"] == "ab"
    assert reply["choices"][0]["token_ids"] == ids("ab") + ids("xy")
    assert reply["usage"]["completion_tokens"] == len(ids("ab") + ids("xy"))
    assert reply["tandem"]["prefill_engine"] == "p0"


def test_half_a_stop_string_at_the_end_is_text(api: Api) -> None:
    api.backend.script = lambda request: deltas("one tw", finish="length")
    choice = api.complete(stop="two").json["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("one tw", "length")


def test_stop_strings_within_the_first_min_tokens_are_text(api: Api) -> None:
    api.backend.script = lambda request: deltas("a.", "b.", "c.")
    count = len(ids("a."))
    choice = api.complete(stop=".", min_tokens=count, max_tokens=9).json["choices"][0]
    assert choice["text"] == "a.b"


def test_a_stop_token_that_the_client_named_is_told_and_is_no_text(api: Api) -> None:
    stop = ids("x")[0]
    api.backend.script = lambda request: [
        TokenDelta([*ids("a"), stop], finish_reason="stop", stop_token_id=stop, details=details())
    ]
    choice = api.complete(stop_token_ids=[stop]).json["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("a", "stop", stop)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"suffix": "x"}, "suffix"),
        ({"prompt": ["a"] * 1025, "n": 2}, "n"),
    ],
)
def test_what_cannot_be_done_is_refused_and_reaches_no_engine(api: Api, fields: dict[str, Any], param: str) -> None:
    reply = api.complete(**fields)
    assert (reply.status, reply.error["param"], reply.error["type"]) == (400, param, "invalid_request_error")
    assert not api.backend.requests


def test_best_of_may_be_n_and_null_is_nothing(api: Api) -> None:
    assert api.complete(n=2, best_of=2).status == 200
    assert api.complete(kv_transfer_params=None, stream_options=None, suffix=None).status == 200


def test_the_official_client_reads_a_completion(api: Api) -> None:
    found = api.client().completions.create(model=MODEL, prompt="hello", logprobs=None, extra_body={"top_k": -1})
    assert found.choices[0].text == "hello world"
    assert found.usage is not None
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 3
    assert found.model_extra is not None
    assert found.model_extra["tandem"]["disaggregated"] is True


def test_special_tokens_are_text_where_a_client_wants_them(api: Api) -> None:
    api.backend.script = lambda request: deltas("hello", f"{START}x")
    assert api.complete().json["choices"][0]["text"] == "hellox"
    for stream in (False, True):
        reply = api.complete(skip_special_tokens=False, stream=stream)
        choices = [event["choices"][0] for event in (reply.events[:-1] if stream else [reply.json])]
        assert "".join(choice["text"] for choice in choices) == f"hello{START}x"


@pytest.mark.parametrize("stream", [False, True])
def test_what_stopped_an_answer_is_in_it_where_a_client_wants_that(api: Api, stream: bool) -> None:
    def text(**fields: Any) -> str:
        reply = api.complete(include_stop_str_in_output=True, stream=stream, **fields)
        choices = [event["choices"][0] for event in (reply.events[:-1] if stream else [reply.json])]
        return "".join(choice["text"] for choice in choices)

    assert text(stop=[" wo"]) == "hello wo"
    assert text(skip_special_tokens=False) == f"hello world{EOS}"
    assert text() == "hello world"


def test_bad_words_are_banned_at_the_start_and_after_a_space(api: Api) -> None:
    assert [ids("hello"), ids(" hello")] == [[263], [292]]
    assert [ids("the"), ids(" the")] == [[257], [260]]
    assert [ids("fox"), ids(" fox")] == [[270, 87], [315]]
    assert api.complete(bad_words=["hello", " the", "fox"]).status == 200
    assert api.backend.requests[0].sampling.banned_runs == [[263], [292], [257], [260], [270, 87]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["x"] * 129}, "bad_words"),
        ({"bad_words": ["x" * 129]}, "bad_words[0]"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": [1] * 16385}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": MODEL_LEN + 1}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 0}, "prompt"),
    ],
)
def test_a_restriction_that_cannot_be_is_refused(api: Api, fields: dict[str, Any], param: str) -> None:
    reply = api.complete(**fields)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert not api.backend.requests


def test_restrictions_are_taken_up_to_their_ends(api: Api) -> None:
    assert api.complete(bad_words=["x" * 128] * 128, allowed_token_ids=[1] * 16384).status == 200
    assert api.complete(allowed_token_ids=[0], truncate_prompt_tokens=MODEL_LEN - 5, max_tokens=5).status == 200


@pytest.mark.parametrize("size", [1, 7, 100])
def test_only_the_last_tokens_of_a_prompt_are_kept(api: Api, size: int) -> None:
    text = "the quick brown fox jumps over the lazy dog " * 20_000
    for prompt in (text, ids(text[-5000:])):
        assert api.complete(prompt=prompt, truncate_prompt_tokens=size).status == 200
        assert api.backend.requests[-1].token_ids == ids(text[-5000:])[-size:]
    assert api.complete(prompt="fox", truncate_prompt_tokens=size).status == 200
    assert api.backend.requests[-1].token_ids == ids("fox")[-size:]


def test_a_prompt_can_be_cut_to_what_leaves_room(api: Api) -> None:
    api.complete(prompt=[1] * 1000, truncate_prompt_tokens=-1, max_tokens=56)
    api.complete(prompt=[1] * 1000, truncate_prompt_tokens=-1.0)
    assert [len(request.token_ids) for request in api.backend.requests] == [200, MODEL_LEN - 1]
    assert [request.sampling.max_tokens for request in api.backend.requests] == [56, 1]


def test_a_chat_is_cut_as_its_prompt_is(api: Api) -> None:
    api.chat(truncate_prompt_tokens=3)
    whole = ids(f"{START}user\nhello{END}\n{START}assistant\n")
    assert api.backend.requests[0].token_ids == whole[-3:]

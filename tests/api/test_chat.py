import json
import threading
from typing import Any

import openai
import pytest

from tandem.api.backend import TokenDelta
from tandem.api.chat_template import ChatTemplate
from tandem.wire.messages import TokenLogprobs
from tests.api.conftest import MODEL, MODEL_LEN, Api, byte_level, deltas, details, ids


def prompt_of(api: Api) -> str:
    """Return what the engine was sent, as text."""
    return byte_level().decode(api.backend.requests[-1].token_ids, skip_special_tokens=False)


def test_a_chat_answer_has_openais_shape(api: Api) -> None:
    found = api.chat(model=MODEL).json
    assert (found["object"], found["id"][:9]) == ("chat.completion", "chatcmpl-")
    assert found["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hello world", "refusal": None},
            "finish_reason": "stop",
            "stop_reason": None,
            "logprobs": None,
        }
    ]
    assert found["usage"]["prompt_tokens"] == len(api.backend.requests[0].token_ids)
    assert found["tandem"]["decode_engine"] == "d0"


def test_messages_go_through_the_models_template(api: Api) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    api.chat(messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": parts}])
    wanted = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(api) == wanted


@pytest.mark.parametrize(
    "part",
    [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"text": "x"}, {"type": "text", "text": 1}],
)
def test_parts_that_are_not_text_are_refused(api: Api, part: dict[str, Any]) -> None:
    reply = api.chat(messages=[{"role": "user", "content": [part]}])
    assert (reply.status, reply.error["param"]) == (400, "messages")


def test_without_max_tokens_a_chat_may_fill_the_model(api: Api) -> None:
    api.chat()
    request = api.backend.requests[0]
    assert request.sampling.max_tokens == MODEL_LEN - len(request.token_ids)


@pytest.mark.parametrize(
    "fields", [{"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}]
)
def test_both_names_of_max_tokens_are_known(api: Api, fields: dict[str, int]) -> None:
    assert api.chat(**fields).status == 200
    assert api.backend.requests[0].sampling.max_tokens == 5


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 999}]}, "messages"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"prompt": "x"}, "prompt"),
    ],
)
def test_what_cannot_be_done_is_refused_and_reaches_no_engine(api: Api, fields: dict[str, Any], param: str) -> None:
    reply = api.chat(**fields)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert not api.backend.requests


def test_logprobs_of_a_chat_have_tokens_and_their_bytes(api: Api) -> None:
    token_ids = ids("🙂")
    api.backend.script = lambda request: (
        [TokenDelta([i], [TokenLogprobs(-0.5, [(i, -0.5), (ids("h")[0], -1.0)])], details=details()) for i in token_ids]
        + [TokenDelta([], finish_reason="length", details=details())]
    )
    content = api.chat(logprobs=True, top_logprobs=2).json["choices"][0]["logprobs"]["content"]
    assert bytes(byte for one in content for byte in one["bytes"]).decode() == "🙂"
    assert [one["top_logprobs"][1] for one in content] == [{"token": "h", "logprob": -1.0, "bytes": [104]}] * len(
        content
    )
    events = api.chat(logprobs=True, stream=True).events[:-1]
    streamed = [one for event in events for one in event["choices"][0]["logprobs"]["content"]]
    assert [one["bytes"] for one in streamed] == [one["bytes"] for one in content]


def test_a_streamed_chat_begins_with_the_role_and_ends_with_how_it_was_made(api: Api) -> None:
    events = api.chat(stream=True, stream_options={"include_usage": True}, return_token_ids=True).events
    *chunks, usage, done = events
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"content": "hello", "role": "assistant"},
        {"content": " world"},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, "stop"]
    assert [chunk["usage"] for chunk in chunks] == [None] * 3
    assert ["tandem" in chunk for chunk in chunks] == [False, False, True]
    assert ["prompt_token_ids" in chunk for chunk in chunks] == [True, False, False]
    assert (usage["choices"], usage["tandem"]["transport"]) == ([], "tcp")
    assert usage["usage"]["completion_tokens"] == len(ids("hello") + ids(" world")) + 1


def test_usage_can_come_with_every_event(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = api.chat(stream=True, stream_options=options).events[:-1]
    counts = [event["usage"]["completion_tokens"] for event in events]
    h, w = len(ids("hello")), len(ids(" world"))
    assert counts == [h, h + w, h + w + 1, h + w + 1]


def test_several_choices_stream_side_by_side(api: Api) -> None:
    events = api.chat(stream=True, n=3).events[:-1]
    for index in range(3):
        own = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "hello world"
        assert own[0]["delta"]["role"] == "assistant"
        assert own[-1]["finish_reason"] == "stop"


def test_a_streamed_answer_is_the_whole_answer(api: Api) -> None:
    text = "grüße 🙂🙃 東京 x"
    api.backend.script = lambda request: [
        *(TokenDelta([i], details=details()) for i in ids(text)),
        TokenDelta([], finish_reason="length", details=details()),
    ]
    whole = api.chat(stop="never").json["choices"][0]["message"]["content"]
    parts = [
        event["choices"][0]["delta"].get("content", "") for event in api.chat(stream=True, stop="never").events[:-1]
    ]
    assert "".join(parts) == whole == text
    assert not any("\ufffd" in part for part in parts)


def test_the_official_client_reads_an_answer_and_a_stream(api: Api) -> None:
    client = api.client()
    messages: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages, n=1, seed=1, user="me", store=False)
    assert answer.choices[0].message.content == "hello world"
    again = [*messages, answer.choices[0].message.model_dump(), *messages]
    stream = client.chat.completions.create(
        model=MODEL, messages=again, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "hello world"
    assert chunks[-1].usage is not None
    assert (chunks[-1].model_extra or {})["tandem"]["prefill_engine"] == "p0"


def test_the_official_client_raises_its_own_errors(api: Api) -> None:
    client = api.client()
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=[{"role": "user", "content": "x"}])
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x"}], temperature=-1)
    assert refused.value.param == "temperature"


def test_a_chat_with_a_stop_string_never_shows_its_beginning(api: Api) -> None:
    api.backend.script = lambda request: deltas("a<", "/s", "top>", "b")
    events = api.chat(stream=True, stop="</stop>").events[:-1]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == "a"
    assert events[-1]["choices"][0]["stop_reason"] == "</stop>"


@pytest.mark.parametrize(
    "told",
    [
        {"reasoning_content": "so " * 2000},
        {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": json.dumps({"a": "x" * 5000})}}]},
    ],
)
def test_a_conversation_with_much_beside_its_text_is_rendered_off_the_event_loop(
    api: Api, monkeypatch: pytest.MonkeyPatch, told: dict[str, Any]
) -> None:
    render, threads = ChatTemplate.render, list[int]()

    def watched(self: ChatTemplate, *given: Any) -> str:
        threads.append(threading.get_ident())
        return render(self, *given)

    monkeypatch.setattr(ChatTemplate, "render", watched)
    for more in ({}, told):
        said = {"role": "assistant", "content": "hello"} | more
        reply = api.chat(messages=[said, {"role": "user", "content": "hello"}])
        assert reply.status == 200, "what the template does not show is no part of the prompt's length"
    short, long = threads
    assert short != long

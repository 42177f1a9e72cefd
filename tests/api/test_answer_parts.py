"""Tool calls and reasoning in chat answers, of a model whose template shows how it writes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.conftest import EOS, TEMPLATE, Api, FakeBackend, byte_level, deltas, running

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
QWEN = (
    "{% if tools %}Tools: {{ tools | tojson }} as <tool_call> {% endif %}"
    "{% if enable_thinking is false %}quick {% endif %}"
    "{% for m in messages %}{% for c in m.tool_calls %}call {{ c.function.arguments.city }} {% endfor %}{% endfor %}"
) + TEMPLATE.replace("{{ m.content }}", "{{ m.reasoning_content }}</think>{{ m.content }}")


def model_folder(folder: Path, own: Path, template: str) -> Path:
    shutil.copy(folder / "tokenizer.json", own)
    (own / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": {"content": EOS}}))
    return own


@pytest.fixture(scope="module")
def shared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(FakeBackend(model_folder(folder, tmp_path_factory.mktemp("qwen"), QWEN))) as found:
        yield found


@pytest.fixture
def api(shared: Api) -> Api:
    shared.backend.reset()
    return shared


def prompt(api: Api) -> list[int]:
    return api.backend.requests[-1].token_ids


def test_calls_reasoning_and_content_are_apart(api: Api) -> None:
    api.backend.script = lambda request: deltas("<think>\nRome?", "\n</think>\n\nI look.", CALL, "\n" + CALL)
    [choice] = api.chat(tools=[TOOL]).json["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("Rome?\n", "I look.")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "weather", "arguments": '{"city": "Rome"}'}
    ] * 2
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    assert choice["finish_reason"] == "tool_calls"


def test_in_a_stream_calls_have_an_index(api: Api) -> None:
    api.backend.script = lambda request: deltas("<think>a</think>b", CALL[:60], CALL[60:], CALL)
    client = api.client()
    message: dict[str, Any] = {"reasoning": "", "content": ""}
    calls: dict[int, list[Any]] = {}
    reasons: list[str | None] = []
    stream: Any = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        tools=[TOOL],  # type: ignore[list-item]
        stream=True,
    )
    for event in stream:
        delta = event.choices[0].delta
        message["reasoning"] += getattr(delta, "reasoning_content", None) or ""
        message["content"] += delta.content or ""
        for call in delta.tool_calls or []:
            calls.setdefault(call.index, []).append(call)
        reasons.append(event.choices[0].finish_reason)
    client.close()
    assert message == {"reasoning": "a", "content": "b"}
    assert [[call.function.name for call in one] for one in calls.values()] == [["weather", None], ["weather"]]
    assert ["".join(call.function.arguments for call in one) for one in calls.values()] == ['{"city": "Rome"}'] * 2
    assert all(
        one[0].id and one[0].type == "function" and not any(call.id for call in one[1:]) for one in calls.values()
    )
    assert reasons[-1] == "tool_calls"


def test_the_model_is_told_of_tools_calls_and_results(api: Api) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "why"},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    assert api.chat(messages=messages, tools=[TOOL], reasoning_effort="none").status == 200
    text = decoded(prompt(api))
    assert "weather" in text.split("<tool_call>")[0]
    assert "call Bern" in text
    assert "quick" in text
    assert "why</think>" in text
    assert "tool\n" in text
    assert api.chat(messages=messages, tools=[TOOL], tool_choice="none").status == 200
    assert "Tools:" not in decoded(prompt(api))


def decoded(token_ids: list[int]) -> str:
    return byte_level().decode(token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": None}])
def test_without_tools_calls_are_text(fields: dict[str, Any], api: Api) -> None:
    api.backend.script = lambda request: deltas(CALL)
    [choice] = api.chat(**({"tools": [TOOL]} | fields)).json["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


def test_a_structured_answer_has_no_reasoning(api: Api) -> None:
    api.backend.script = lambda request: deltas('{"a": "<think>"}')
    [choice] = api.chat(response_format={"type": "json_object"}).json["choices"]
    assert choice["message"]["content"] == '{"a": "<think>"}'
    assert api.backend.requests[0].grammar is not None


@pytest.mark.parametrize("arguments", ["[1]", "{", "1"])
def test_arguments_that_are_no_object_are_refused(arguments: str, api: Api) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    reply = api.chat(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert (reply.status, reply.error["param"]) == (400, "messages[0].tool_calls")


@pytest.mark.parametrize(
    ("mark", "form"),
    [("[TOOL_CALLS]", r"[0-9a-f]{9}"), ("<tool_call>", r"call_[0-9a-f]{24}"), ("", r"call_[0-9a-f]{24}")],
)
def test_a_forced_call_has_an_id_that_the_models_own_template_takes(
    folder: Path, tmp_path: Path, mark: str, form: str
) -> None:
    backend = FakeBackend(model_folder(folder, tmp_path, TEMPLATE + "{# " + mark + " #}"))
    backend.script = lambda request: deltas('[{"name":"weather","parameters":{}}]')
    with running(backend) as api:
        for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            [answer] = api.chat(tools=[TOOL], tool_choice=choice).json["choices"]
            [call] = answer["message"]["tool_calls"]
            assert re.fullmatch(form, call["id"])

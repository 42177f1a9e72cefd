"""Structured answers over HTTP: every one is valid, and the same with prefill and decode apart and on one engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import tandem
from tests.support.deployment import Deployment
from tests.support.http import Stream

MODEL = Path(tandem.__file__).parent / "demo_model"
SHORT = {"type": "string", "maxLength": 8}
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": False}


def object_of(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    names = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def array_of(items: Any, most: int = 3, **fields: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, "maxItems": most} | fields


SCHEMAS: list[dict[str, Any]] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": 0, "maximum": 120},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "integer", "exclusiveMinimum": 10, "exclusiveMaximum": 13},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.25},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, "two", None, True, {"three": 3}]},
    {"const": {"fixed": [1, 2]}},
    SHORT,
    {"type": "string", "minLength": 3, "maxLength": 5},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    array_of({"type": "boolean"}),
    array_of({"enum": ["a", "b"]}, minItems=2),
    array_of(array_of({"type": "null"}, 2), 2),
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": [1, 2]}], "items": False, "minItems": 2},
    object_of(name=SHORT),
    object_of(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 120}),
    object_of([], a={"type": "boolean"}, b={"type": "boolean"}),
    object_of(["b"], a={"type": "boolean"}, b={"type": "null"}),
    object_of(point=object_of(x={"enum": [0, 1]}, y={"enum": [0, 1]})),
    object_of(tags=array_of({"enum": ["new", "old"]})),
    object_of(kind={"const": "circle"}, radius={"type": "integer", "minimum": 1, "maximum": 9}),
    {"anyOf": [object_of(a={"type": "null"}), object_of(b={"type": "boolean"})]},
    {"oneOf": [object_of(k={"const": "a"}, v={"enum": [1]}), object_of(k={"const": "b"}, v={"enum": [2]})]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    {"$defs": {"colour": {"enum": ["red", "blue"]}}, **object_of(front={"$ref": "#/$defs/colour"})},
    {"$defs": {"node": NODE}, "type": "object", "properties": {"head": {"const": 1}}, "additionalProperties": False},
    {"type": "object", "properties": {'ключ "x"': {"type": "boolean"}}, "required": ['ключ "x"'], "maxProperties": 1},
    object_of(a={"anyOf": [{"type": "boolean"}, {"type": "null"}]}),
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 0},
]


@pytest.fixture(scope="module")
def mixed() -> Iterator[Deployment]:
    with Deployment(MODEL, "--prefill", "0") as running:
        yield running


@pytest.fixture(scope="module")
def split() -> Iterator[Deployment]:
    with Deployment(MODEL) as running:
        yield running


def ask(deployment: Deployment, **fields: Any) -> Any:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 800, "seed": 3} | fields
    reply = deployment.http.send("POST", "/v1/chat/completions", body)
    assert reply.status == 200, reply.body.decode()
    return reply


def answer_to(deployment: Deployment, schema: dict[str, Any], **fields: Any) -> str:
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    choice = ask(deployment, response_format=form, **fields).choice
    assert choice["finish_reason"] == "stop", choice
    text: str = choice["message"]["content"]
    return text


def test_answers_are_valid_and_the_same_on_one_engine_and_on_two(mixed: Deployment, split: Deployment) -> None:
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda schema: answer_to(mixed, schema), SCHEMAS))
        apart = list(threads.map(lambda schema: answer_to(split, schema), SCHEMAS))
    for schema, text in zip(SCHEMAS, together, strict=True):
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert apart == together
    assert ask(split, response_format={"type": "json_object"}, max_tokens=3).how["disaggregated"]


def test_stages_and_slices_sample_under_the_grammar_too() -> None:
    schema = SCHEMAS[23]
    with Deployment(MODEL, "--prefill-tp", "2", "--decode-pp", "2", "--connector", "tcp") as running:
        for seed in range(4):
            jsonschema.validate(json.loads(answer_to(running, schema, seed=seed)), schema)


def test_a_preempted_answer_goes_on_under_its_grammar(mixed: Deployment) -> None:
    schema = object_of(a={"type": "string", "minLength": 60, "maxLength": 70}, b={"type": "boolean"})
    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}

    def answer(deployment: Deployment, seed: int) -> Any:
        return ask(deployment, response_format=form, seed=seed)

    with Deployment(MODEL, "--prefill", "0", "--kv-memory", "800KiB") as small, ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda seed: answer(small, seed), range(8)))
    assert sum(reply.how["recomputations"] for reply in replies) > 0
    for seed, reply in enumerate(replies):
        assert reply.choice["message"]["content"] == answer(mixed, seed).choice["message"]["content"]


TEXTS = {
    "response_format": ({"type": "json_object"}, r"\{.*"),
    "guided_regex": ("(yes|no), [0-9]{3}", r"(yes|no), [0-9]{3}"),
    "guided_choice": (["alpha", 'be"ta\\', "Ωmega"], r'alpha|be"ta\\|Ωmega'),
    "guided_grammar": ('root ::= "a" [0-9] "z"', r"a[0-9]z"),
    "guided_json": ('{"enum": ["x", "y"]}', r'"x"|"y"'),
    "structured_outputs": ({"regex": "[ab]{5}"}, r"[ab]{5}"),
}


@pytest.mark.parametrize("field", TEXTS)
@pytest.mark.parametrize("stream", [False, True])
def test_each_field_constrains_every_choice(field: str, stream: bool, split: Deployment) -> None:
    value, pattern = TEXTS[field]
    body = {"prompt": "hello", "max_tokens": 60, "seed": 5, "n": 2, field: value}
    texts = ["", ""]
    if stream:
        for event in Stream(split.http.start("POST", "/v1/completions", body | {"stream": True})):
            for choice in event["choices"]:
                texts[choice["index"]] += choice["text"]
    else:
        texts = [choice["text"] for choice in split.http.send("POST", "/v1/completions", body).json["choices"]]
    assert all(re.fullmatch(pattern, text, re.DOTALL) for text in texts), texts


def test_what_else_a_request_asks_for_holds_within_the_grammar(mixed: Deployment) -> None:
    def text(**fields: Any) -> str:
        content: str = ask(mixed, **fields).choice["message"]["content"]
        return content

    biased = {"logit_bias": {"33": 100, "34": 90}}  # B, which is not allowed, and C
    assert text(guided_regex="[ac-zC]{4}", **biased) == "CCCC"
    assert text(guided_regex="[ab]{2,9}", min_tokens=9, ignore_eos=True).strip("ab") == ""
    assert len(text(guided_regex="[ab]{2,9}", min_tokens=9)) == 9
    assert len(text(guided_regex="[ab]{3}", min_tokens=30)) == 3, "what has ended cannot go on"
    assert len(text(guided_regex="[ab]{3}", ignore_eos=True)) == 3
    assert text(guided_regex="abcdef", stop=["cd"]) == "ab"
    assert text(guided_regex="abcdef", max_tokens=2) == "ab"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "word"}}}},
         "response_format"),
        ({"guided_regex": "("}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * 200_000}, "guided_regex"),
        ({"guided_choice": []}, "guided"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_grammar": "start: word"}, "guided_grammar"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    ],
)  # fmt: skip
def test_what_is_broken_or_huge_is_refused_by_its_name(fields: dict[str, Any], param: str, mixed: Deployment) -> None:
    reply = mixed.http.send("POST", "/v1/completions", {"prompt": "hello"} | fields)
    assert (reply.status, reply.error["param"]) == (400, param), reply.body.decode()


CITY = object_of(city={"enum": ["Rome", "Bern"]}, days={"type": "integer", "minimum": 1, "maximum": 9})
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "Forecast.", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock"}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_must_be_made_is_made_and_fits(choice: Any, split: Deployment, mixed: Deployment) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 400, "parallel_tool_calls": False}
    called = []
    for seed in range(3):
        whole = ask(split, seed=seed, **fields).choice
        assert whole["finish_reason"] in ("tool_calls", "length")
        if whole["finish_reason"] == "length":
            continue
        [call] = whole["message"]["tool_calls"]
        assert whole["message"]["content"] is None
        assert call["type"] == "function"
        called.append(call["function"]["name"])
        if call["function"]["name"] == "weather":
            jsonschema.validate(json.loads(call["function"]["arguments"]), CITY)
        assert streamed_calls(mixed, seed=seed, **fields) == ([call["function"]], "tool_calls")
    assert called, "no call was finished"
    assert set(called) <= ({"weather"} if isinstance(choice, dict) else {"weather", "clock"})


def streamed_calls(deployment: Deployment, **fields: Any) -> tuple[list[Any], str | None]:
    body = {"messages": [{"role": "user", "content": "hello"}], "stream": True} | fields
    found: list[Any] = []
    reason = None
    for event in Stream(deployment.http.start("POST", "/v1/chat/completions", body)):
        for choice in event["choices"]:
            reason = choice["finish_reason"] or reason
            for call in choice["delta"].get("tool_calls", []):
                if "name" in call["function"]:
                    found.append(call["function"])
                else:
                    found[-1]["arguments"] += call["function"]["arguments"]
            assert not choice["delta"].get("content")
    return found, reason


def test_a_conversation_with_calls_can_go_on(mixed: Deployment) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "What time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00"},
    ]
    assert ask(mixed, messages=messages, tools=TOOLS, tool_choice="none", max_tokens=4).choice["message"]["content"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS}, "tools"),  # this model's template shows no way to write a call
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "word"}}}],
          "tool_choice": "required"}, "tools"),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_are_refused(fields: dict[str, Any], param: str, mixed: Deployment) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}]} | fields
    reply = mixed.http.send("POST", "/v1/chat/completions", body)
    assert (reply.status, reply.error["param"]) == (400, param), reply.body.decode()

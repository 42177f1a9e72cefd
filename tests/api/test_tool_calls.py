"""Calls as the models of each family write them, in whatever pieces the text comes."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.api.tool_calls import ToolCallParser
from tandem.api.tool_syntaxes import FORCED, SYNTAXES, CallFragment, ToolSyntax, syntax_of


class ToolCall(NamedTuple):
    name: str
    arguments: str


class Parsed(NamedTuple):
    content: str
    calls: list[ToolCall]


WEATHER = ToolCall("get_weather", '{"city": "Zürich", "days": 2}')
TIME = ToolCall("get_time", "{}")
BEGIN, END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")

# syntax, text, content, calls
CASES: list[tuple[str, str, str, list[ToolCall]]] = [
    ("hermes", "Just words with < and <tool words.", "Just words with < and <tool words.", []),
    (
        "hermes",
        'I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>',
        "I look.\n",
        [WEATHER],
    ),
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>\n',
        "",
        [WEATHER, TIME],
    ),
    ("hermes", "<tool_call>\nnot json\n</tool_call>", "<tool_call>\nnot json\n</tool_call>", []),
    ("hermes", '<tool_call>\n{"name": "cut', '<tool_call>\n{"name": "cut', []),
    ("llama3_json", '{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2}}', "", [WEATHER]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Zürich", "days": 2}}; '
        '{"name": "get_time", "parameters": {}}',
        "",
        [WEATHER, TIME],
    ),
    ("llama3_json", 'A set is {"name": "get_time"}', 'A set is {"name": "get_time"}', []),
    ("llama3_json", '{"answer": 42} is JSON', '{"answer": 42} is JSON', []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Zürich", "days": 2}}, '
        '{"name": "get_time", "arguments": {}}]',
        "",
        [WEATHER, TIME],
    ),
    ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Zürich", "days": 2}', "", [WEATHER]),
    ("mistral", "Well.[TOOL_CALLS]get_time{}[TOOL_CALLS]get_time{}", "Well.", [TIME, TIME]),
    ("mistral", "[TOOL_CALLS]get_time{} Done.", "Done.", [TIME]),
    ("mistral", "[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    ("mistral", "[TOOL] is text", "[TOOL] is text", []),
    (
        "deepseek",
        f'Hm.{SECTION[0]}{BEGIN}function{SEP}get_weather\n```json\n{{"city": "Zürich", "days": 2}}\n```{END}\n'
        f"{BEGIN}function{SEP}get_time\n```json\n{{}}\n```{END}{SECTION[1]}",
        "Hm.",
        [WEATHER, TIME],
    ),
    ("deepseek", f'{SECTION[0]}{BEGIN}get_weather{SEP}{{"city": "Zürich", "days": 2}}{END}{SECTION[1]}', "", [WEATHER]),
    ("deepseek", "No call.", "No call.", []),
    ("forced", '[{"name":"get_weather","parameters":{"city": "Zürich", "days": 2}}]', "", [WEATHER]),
    ("forced", '[{"name":"get_weather","param', '[{"name":"get_weather","param', []),
]


def syntax(name: str) -> ToolSyntax:
    return FORCED if name == "forced" else SYNTAXES[name]


def read(name: str, pieces: list[str]) -> Parsed:
    parser = ToolCallParser(syntax(name))
    return joined([one for piece in pieces for one in parser.push(piece)] + parser.finish())


def joined(parsed: list[str | CallFragment]) -> Parsed:
    calls: list[ToolCall] = []
    for one in parsed:
        if isinstance(one, str):
            continue
        if one.name is not None:
            calls.append(ToolCall(one.name, one.arguments))
        else:
            calls[-1] = ToolCall(calls[-1].name, calls[-1].arguments + one.arguments)
    return Parsed("".join(one for one in parsed if isinstance(one, str)), calls)


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_are_told_from_content(name: str, text: str, content: str, calls: list[ToolCall]) -> None:
    assert read(name, [text]) == Parsed(content, calls)
    assert read(name, list(text)) == Parsed(content, calls)


@given(st.data())
def test_the_pieces_in_which_a_text_comes_do_not_matter(data: st.DataObject) -> None:
    name, text, content, calls = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(text) - 1)), max_size=8)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert read(name, pieces) == Parsed(content, calls)


def test_json_that_is_too_deep_is_content() -> None:
    text = f"<tool_call>{'[' * 100_000}</tool_call>"
    assert read("hermes", [text]) == Parsed(text, [])


MARKS = [mark for one in (*SYNTAXES.values(), FORCED) for mark in (one.opening, *one.noise)]
PIECES = [
    "</tool_call>",
    "[ARGS]",
    END,
    SEP,
    *'{}[]":, \n',
    '{"name": "f"}',
    '"name":',
    '"arguments":',
    '{"a": 1}',
    "f",
    "12",
]


@given(st.sampled_from([*sorted(SYNTAXES), "forced"]), st.lists(st.sampled_from(MARKS + PIECES), max_size=12))
def test_any_text_comes_to_the_same_whole_or_in_pieces(name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    parsed = read(name, [text])
    assert read(name, list(text)) == parsed
    assert read(name, pieces) == parsed
    if not parsed.calls and not any(mark in text for mark in syntax(name).noise):
        assert parsed.content == text


def test_content_goes_out_as_soon_as_it_cannot_be_a_call() -> None:
    parser = ToolCallParser(SYNTAXES["hermes"])
    assert parser.push("Hello <tool") == ["Hello "]
    assert parser.push("s>") == ["<tools>"]


@pytest.mark.parametrize(("name", "text", "content", "calls"), [one for one in CASES if one[3]])
def test_arguments_come_as_they_are_written(name: str, text: str, content: str, calls: list[ToolCall]) -> None:
    parser = ToolCallParser(syntax(name))
    fragments = [one for character in text for one in parser.push(character) if isinstance(one, CallFragment)]
    assert [one.name for one in fragments if one.name] == [call.name for call in calls]
    assert max(len(one.arguments) for one in fragments) == 1


CUT = [
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "</tool_call>', ToolCall("f", '{"a": "</tool_call>')),
    ("llama3_json", '{"name": "f", "parameters": {"a', ToolCall("f", '{"a')),
    ("mistral", "[TOOL_CALLS]f[ARGS]{", ToolCall("f", "{")),
    ("deepseek", f"{BEGIN}f{SEP}{{1", ToolCall("f", "{1")),
    ("forced", '[{"name":"f","parameters":{"a": [', ToolCall("f", '{"a": [')),
]


@pytest.mark.parametrize(("name", "text", "call"), CUT)
def test_a_call_that_is_cut_has_the_arguments_so_far(name: str, text: str, call: ToolCall) -> None:
    assert read(name, [text]) == read(name, list(text)) == Parsed("", [call])


def test_a_call_whose_name_comes_last_is_read_when_it_is_complete() -> None:
    text = '<tool_call>{"arguments": "{\\"a\\": 1}", "name": "f"}</tool_call>'
    assert read("hermes", list(text)) == Parsed("", [ToolCall("f", '{"a": 1}')])


@given(st.text(alphabet='{}[]"\\a', max_size=20), st.data())
def test_brackets_in_strings_do_not_end_arguments(text: str, data: st.DataObject) -> None:
    arguments = json.dumps({"a": text, "b": [text]})
    whole = f'<tool_call>{{"name": "f", "arguments": {arguments}}}</tool_call>'
    cut = data.draw(st.integers(0, len(whole)))
    assert read("hermes", [whole[:cut], whole[cut:]]) == Parsed("", [ToolCall("f", arguments)])


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        (f"{{{{ '{BEGIN}' }}}}", "deepseek"),
        ("Environment: ipython", "llama3_json"),
        ("{{ messages }}", None),
        (None, None),
    ],
)
def test_the_template_shows_how_calls_are_written(template: str | None, name: str | None) -> None:
    assert syntax_of("auto", template) is (None if name is None else SYNTAXES[name])
    assert syntax_of("hermes", template) is SYNTAXES["hermes"]
    assert syntax_of("none", template) is None

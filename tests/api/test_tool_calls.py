"""Calls as the models of each family write them, in whatever pieces the text comes."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.api.tool_calls import FORCED, SYNTAXES, Parsed, ToolCall, ToolCallParser, ToolSyntax, syntax_of

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
    ("forced", '[{"name":"get_weather","parameters":{"city":"Zürich","days":2}}]', "", [WEATHER]),
    ("forced", '[{"name":"get_weather","param', '[{"name":"get_weather","param', []),
]


def syntax(name: str) -> ToolSyntax:
    return FORCED if name == "forced" else SYNTAXES[name]


def read(name: str, pieces: list[str]) -> Parsed:
    parser = ToolCallParser(syntax(name))
    parsed = [*(parser.push(piece) for piece in pieces), parser.finish()]
    return Parsed("".join(one.content for one in parsed), [call for one in parsed for call in one.calls])


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
    for call in parsed.calls:
        json.loads(call.arguments)
    if not parsed.calls and not any(mark in text for mark in syntax(name).noise):
        assert parsed.content == text


def test_content_goes_out_as_soon_as_it_cannot_be_a_call() -> None:
    parser = ToolCallParser(SYNTAXES["hermes"])
    assert parser.push("Hello <tool").content == "Hello "
    assert parser.push("s>").content == "<tools>"


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

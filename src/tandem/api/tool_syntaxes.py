"""How each family of models writes tool calls. Pure: readers that go on when more text comes.

A reader is a generator. It looks at the text of its `Source`, yields where what it has may still become more than one
thing, and returns whether it found a call. Nothing is dropped before it is known that a call begins, and what is known
depends on the text alone, not on the pieces in which it came.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

Reading = Generator[None, None, bool]
MAX_HEAD = 1024
"""Characters between what opens a call and its arguments; with more of them it is none."""
_CLOSE = "</tool_call>"
_SEP, _END = "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


@dataclass(frozen=True, slots=True)
class CallFragment:
    """A part of a call.

    Attributes:
        name: of the function, where a call begins; None where the latest one goes on.
        arguments: more of the JSON, as the model wrote it.
    """

    name: str | None
    arguments: str


@dataclass(slots=True)
class Source:
    """The text that a reader has not taken yet. `final`: no more comes."""

    text: str = ""
    final: bool = False
    found: list[CallFragment] = field(default_factory=list)

    def begin(self, name: str, length: int) -> None:
        """Begin a call, whose head takes so many characters."""
        self.found.append(CallFragment(name, ""))
        self.drop(length)

    def pass_on(self, length: int) -> None:
        """Give so many characters to the arguments of the latest call."""
        if length:
            self.found.append(CallFragment(None, self.text[:length]))
            self.drop(length)

    def drop(self, length: int) -> None:
        self.text = self.text[length:]

    def after_space(self, start: int = 0) -> int:
        """Return where the first character from `start` on is that is no space."""
        return len(self.text) - len(self.text[start:].lstrip())


class JsonEnd:
    """Finds where a JSON object or list ends, in text that comes in pieces; it need not be valid inside.

    Args:
        depth: brackets that are open before the text.
    """

    _MARKS = re.compile(r'["{}\[\]]')
    _STRING = re.compile(r'[\\"]')

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._quoted = False
        self._escaped = False

    def feed(self, text: str) -> int | None:
        """Return the number of characters of `text` up to the end; None if it does not come in it."""
        place = 0
        if self._escaped and text:
            place, self._escaped = 1, False
        while True:
            mark = (self._STRING if self._quoted else self._MARKS).search(text, place)
            if mark is None:
                return None
            place = mark.end()
            match mark[0]:
                case "\\":
                    self._escaped = place == len(text)
                    place += 1
                case '"':
                    self._quoted = not self._quoted
                case "{" | "[":
                    self._depth += 1
                case _:
                    self._depth -= 1
                    if self._depth <= 0:
                        return place


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """How calls are written.

    Attributes:
        opening: what a call begins with.
        read: reads the calls at the start of a text that begins with `opening`. Raises ValueError for what is no call.
        anchored: a call is only what an answer begins with.
        noise: what stands around calls and is no content.
        special: the marks are special tokens of the model, which text otherwise leaves out.
        id_prefix, id_chars: a call's id is the one, and then so many characters; templates may insist on it.
    """

    opening: str
    read: Callable[[Source], Reading]
    anchored: bool = False
    noise: tuple[str, ...] = ()
    special: bool = False
    id_prefix: str = "call_"
    id_chars: int = 24


def _call(value: Any) -> tuple[str, str]:
    """Return name and arguments of a call that is written as a JSON object. Raises ValueError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call has a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    return value["name"], arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


_S = r"\s{0,64}"
_HEAD = re.compile(rf'\{{{_S}"name"{_S}:{_S}"([^"\\]{{1,256}})"{_S},{_S}"(?:arguments|parameters)"{_S}:{_S}(?=\{{)')


def _object(source: Source, start: int = 0, closing: str = "") -> Reading:
    """Read a call that is an object at `start`: its arguments as they come, if its name comes first.

    Args:
        closing: what comes after it, and not before its arguments.
    """
    end, seen = JsonEnd(), start
    while True:
        closed = source.text.find(closing, start) if closing else -1
        limit = len(source.text) if closed < 0 else closed
        if head := _HEAD.match(source.text, start, limit):
            source.begin(head[1], head.end())
            yield from _arguments(source)
            yield from _rest_of_object(source)
            return True
        if (length := end.feed(source.text[seen:limit])) is not None:
            name, arguments = _call(json.loads(source.text[start : seen + length]))
            source.begin(name, seen + length)
            source.found.append(CallFragment(None, arguments))
            return True
        seen = max(seen, limit)
        if source.final or closed >= 0:
            return False
        yield


def _arguments(source: Source) -> Reading:
    """Pass on the object that the text begins with, as far as it comes."""
    end = JsonEnd()
    while True:
        length = end.feed(source.text)
        source.pass_on(len(source.text) if length is None else length)
        if length is not None or source.final:
            return True
        yield


def _rest_of_object(source: Source) -> Reading:
    """Drop what an object has behind the arguments, up to its end."""
    yield from _until_text(source)
    place = source.after_space()
    if source.text.startswith("}", place):
        source.drop(place + 1)
    elif source.text.startswith(",", place):
        end = JsonEnd(depth=1)
        while (length := end.feed(source.text)) is None and not source.final:
            source.drop(len(source.text))
            yield
        source.drop(len(source.text) if length is None else length)
    return True


def _until_text(source: Source, start: int = 0) -> Reading:
    """Wait until there is more than space from `start` on."""
    while source.after_space(start) == len(source.text) and not source.final:
        yield
    return True


def _skip(source: Source, mark: str) -> Reading:
    """Drop a mark, and the space before it, if it comes next."""
    while True:
        place = source.after_space()
        if source.text.startswith(mark, place):
            source.drop(place + len(mark))
            return True
        if source.final or not mark.startswith(source.text[place:]):
            return False
        yield


def _hermes(source: Source) -> Reading:
    start = len("<tool_call>")
    yield from _until_text(source, start)
    start = source.after_space(start)
    if not source.text.startswith("{", start):
        return False
    found = yield from _object(source, start, _CLOSE)
    if found:
        yield from _skip(source, _CLOSE)
    return found


def _list(source: Source, start: int = 0) -> Reading:
    """Read a list of calls that begins at `start`; after its first call it ends where no other one follows."""
    found, start = False, start + 1
    while True:
        yield from _until_text(source, start)
        start = source.after_space(start)
        if found and source.text.startswith("]", start):
            source.drop(start + 1)
            return True
        if found and source.text.startswith(",", start):
            yield from _until_text(source, start + 1)
            start = source.after_space(start + 1)
        if not source.text.startswith("{", start):
            return found
        try:
            one = yield from _object(source, start)
        except (ValueError, RecursionError):
            one = False
        if not one:
            return found
        found, start = True, 0


def _until_brace(source: Source, start: int) -> Generator[None, None, int]:
    """Wait for the brace with which arguments begin; return where it is, or -1 if there is none."""
    while True:
        brace = source.text.find("{", start, start + MAX_HEAD)
        if brace >= 0 or source.final or len(source.text) >= start + MAX_HEAD:
            return brace
        yield


_MISTRAL_NAME = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?")


def _mistral(source: Source) -> Reading:
    """`[TOOL_CALLS] [{...}, ...]`, or since 2025 `[TOOL_CALLS]name[ARGS]{...}` for each call."""
    start = len("[TOOL_CALLS]")
    yield from _until_text(source, start)
    if source.text.startswith("[", place := source.after_space(start)):
        return (yield from _list(source, place))
    brace = yield from _until_brace(source, start)
    named = _MISTRAL_NAME.fullmatch(source.text, start, max(start, brace))
    if named is None:
        return False
    source.begin(named[1], brace)
    return (yield from _arguments(source))


_DEEPSEEK_BEGIN = "<｜tool▁call▁begin｜>"
_DEEPSEEK_NAME = re.compile(rf"(?:function{_SEP})?([^\n<]+?)(?:{_SEP}|\n)\s*(?:```json\s*)?")


def _deepseek(source: Source) -> Reading:
    """`function<sep>name` and a fenced block of JSON (V3, R1), or `name<sep>{...}` (V3.1)."""
    start = len(_DEEPSEEK_BEGIN)
    brace = yield from _until_brace(source, start)
    named = _DEEPSEEK_NAME.fullmatch(source.text, start, max(start, brace))
    if named is None:
        return False
    source.begin(named[1].strip(), brace)
    yield from _arguments(source)
    yield from _skip(source, "```")
    yield from _skip(source, _END)
    return True


SYNTAXES: dict[str, ToolSyntax] = {
    "hermes": ToolSyntax("<tool_call>", _hermes),
    "llama3_json": ToolSyntax("{", _object, anchored=True, noise=("<|python_tag|>",), special=True),
    "mistral": ToolSyntax("[TOOL_CALLS]", _mistral, special=True, id_prefix="", id_chars=9),
    "deepseek": ToolSyntax(
        _DEEPSEEK_BEGIN, _deepseek, noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), special=True
    ),
}
FORCED = ToolSyntax("[", _list, anchored=True)
"""A list of calls, as the grammar of `required` and of a named tool has it, whatever the model's own way is."""


def syntax_of(name: str, template: str | None) -> ToolSyntax | None:
    """Return the syntax of this name; for `auto` the one that the model's chat template shows."""
    if name != "auto":
        return SYNTAXES.get(name)
    marks = {"<tool_call>": "hermes", "[TOOL_CALLS]": "mistral", "tool▁call": "deepseek", "ipython": "llama3_json"}
    return next((SYNTAXES[found] for mark, found in marks.items() if mark in (template or "")), None)

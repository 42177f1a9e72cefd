"""Tool calls in the text of a model: each family writes them in its own way. Pure: text in, content and calls out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tandem.api.marks import held_back


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments`: JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a piece of text came to."""

    content: str
    calls: list[ToolCall]


Taken = tuple[list[ToolCall], int]
SEPARATORS = " ;,\n"
"""May stand between calls."""


@dataclass(frozen=True, slots=True)
class ToolSyntax:
    """How calls are written.

    Attributes:
        opening: what a call begins with.
        take: reads the calls at the start of a text that begins with `opening`, and where they end; None if that has
            not come yet. Raises ValueError for what is no call.
        anchored: a call is only what an answer begins with.
        noise: what stands around calls and is no content.
        special: the marks are special tokens of the model, which text otherwise leaves out.
        id_prefix, id_chars: a call's id is the one, and then so many characters; templates may insist on it.
    """

    opening: str
    take: Callable[[str], Taken | None]
    anchored: bool = False
    noise: tuple[str, ...] = ()
    special: bool = False
    id_prefix: str = "call_"
    id_chars: int = 24


@dataclass(slots=True)
class ToolCallParser:
    """Takes an answer's text in pieces; text that may be the start of a mark is held back."""

    syntax: ToolSyntax
    _after_call: bool = False
    _text: str = ""
    _inside: bool = False
    _plain: bool = False

    def push(self, text: str) -> Parsed:
        """Return the content and the calls that are complete with this piece."""
        self._text += text
        return self._advance(final=False)

    def finish(self) -> Parsed:
        """Return the rest: a call that was not completed is content, as it was written."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> Parsed:
        content, calls = "", list[ToolCall]()
        while True:
            if not self._inside:
                start = self._find()
                end = start if start >= 0 else len(self._text) - (0 if final else self._held_back())
                shown = self._clean(self._text[:end])
                content += shown
                self._plain |= self.syntax.anchored and bool(shown.strip())
                self._text = self._text[end:]
                if start < 0:
                    return Parsed(content, calls)
                self._inside = True
            try:
                taken = self.syntax.take(self._text)
            except (ValueError, RecursionError):
                self._inside, self._plain = False, self.syntax.anchored
                mark = len(self.syntax.opening)
                content, self._text = content + self._text[:mark], self._text[mark:]
                continue
            if taken is None:
                if not final:
                    return Parsed(content, calls)
                return Parsed(content + self._text, calls)
            calls += taken[0]
            self._text, self._inside, self._after_call = self._text[taken[1] :], False, True

    def _find(self) -> int:
        """Return where the next call begins, or -1."""
        start = self._text.find(self.syntax.opening)
        if not self.syntax.anchored or start < 0:
            return start
        before = _without_first(self.syntax.noise, self._text[:start]).strip(SEPARATORS if self._after_call else None)
        return -1 if self._plain or before else start

    def _held_back(self) -> int:
        return held_back(self._text, (self.syntax.opening, *self.syntax.noise))

    def _clean(self, text: str) -> str:
        """Return text without noise, and without what separates it from a call before it."""
        if self._plain:
            return text
        if self.syntax.anchored:
            text = _without_first(self.syntax.noise, text)
        else:
            for mark in self.syntax.noise:
                text = text.replace(mark, "")
        if self._after_call:
            text = text.lstrip(SEPARATORS)
            self._after_call = not text
        return text


def _without_first(marks: tuple[str, ...], text: str) -> str:
    """Return a text without the marks that nothing but space stands before."""
    kept = ""
    while True:
        rest = text.lstrip()
        kept, text = kept + text[: len(text) - len(rest)], rest
        mark = next((one for one in marks if text.startswith(one)), None)
        if mark is None:
            return kept + text
        text = text.removeprefix(mark)


def call_of(value: Any) -> ToolCall:
    """Return a call that is written as a JSON object. Raises ValueError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("a call has a name")
    arguments = value.get("arguments", value.get("parameters", {}))
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(value["name"], text)


def _decoded(text: str, start: int) -> tuple[Any, int] | None:
    """Return the JSON value at `start` and its end; None while it is not complete."""
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value, end


def _hermes(text: str) -> Taken | None:
    end = text.find("</tool_call>")
    if end < 0:
        return None
    return [call_of(json.loads(text[len("<tool_call>") : end]))], end + len("</tool_call>")


def _object(text: str) -> Taken | None:
    found = _decoded(text, 0) if "}" in text else None
    return None if found is None else ([call_of(found[0])], found[1])


def _list(text: str) -> Taken | None:
    found = _decoded(text, 0) if "]" in text else None
    if found is None:
        return None
    if not found[0]:
        raise ValueError("a list of calls has one at least")
    return [call_of(one) for one in found[0]], found[1]


_MISTRAL_NAME = re.compile(r"\[TOOL_CALLS\]\s*([\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\]\s*)?(?=\{)")


def _mistral(text: str) -> Taken | None:
    """`[TOOL_CALLS] [{...}, ...]`, or since 2025 `[TOOL_CALLS]name[ARGS]{...}` for each call."""
    start = len("[TOOL_CALLS]")
    start += len(text[start:]) - len(text[start:].lstrip())
    if text.startswith("[", start):
        listed = _list(text[start:])
        return None if listed is None else (listed[0], start + listed[1])
    named = _MISTRAL_NAME.match(text)
    found = _decoded(text, named.end()) if named is not None and "}" in text else None
    if named is None or found is None:
        return None
    return [ToolCall(named[1], json.dumps(found[0], ensure_ascii=False))], found[1]


_DEEPSEEK = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK_CALL = re.compile(
    r"(?:function<｜tool▁sep｜>)?([^\n<]+?)(?:<｜tool▁sep｜>|\n)\s*(?:```json\s*)?(.*?)\s*(?:```)?\s*", re.DOTALL
)


def _deepseek(text: str) -> Taken | None:
    """`function<sep>name` and a fenced block of JSON (V3, R1), or `name<sep>{...}` (V3.1)."""
    opening, closing = _DEEPSEEK
    end = text.find(closing)
    if end < 0:
        return None
    found = _DEEPSEEK_CALL.fullmatch(text[len(opening) : end])
    if found is None:
        raise ValueError("a call has a name and arguments")
    return [ToolCall(found[1].strip(), json.dumps(json.loads(found[2]), ensure_ascii=False))], end + len(closing)


SYNTAXES: dict[str, ToolSyntax] = {
    "hermes": ToolSyntax("<tool_call>", _hermes),
    "llama3_json": ToolSyntax("{", _object, anchored=True, noise=("<|python_tag|>",), special=True),
    "mistral": ToolSyntax("[TOOL_CALLS]", _mistral, special=True, id_prefix="", id_chars=9),
    "deepseek": ToolSyntax(
        _DEEPSEEK[0], _deepseek, noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"), special=True
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

"""Tool calls in the text of a model. Pure: text in, content and calls out, in their order."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.api.marks import held_back
from tandem.api.tool_syntaxes import CallFragment, Reading, Source, ToolSyntax

Parsed = list[str | CallFragment]
"""Content, and parts of calls, in the order in which the model wrote them."""
SEPARATORS = " ;,\n"
"""May stand between calls."""


@dataclass(slots=True)
class ToolCallParser:
    """Takes an answer's text in pieces; text that may be the start of a mark is held back.

    A call is known as such by its name and where its arguments begin. From there on they are passed on as they come,
    so what they turn out to be is the client's to check; text that never comes so far is content, as it was written.
    """

    syntax: ToolSyntax
    _source: Source = field(default_factory=Source)
    _reading: Reading | None = None
    _after_call: bool = False
    _plain: bool = False

    def push(self, text: str) -> Parsed:
        """Return the content and the calls that are certain with this piece."""
        self._source.text += text
        return self._advance()

    def finish(self) -> Parsed:
        """Return the rest."""
        self._source.final = True
        return self._advance()

    def _advance(self) -> Parsed:
        parsed: Parsed = []
        while True:
            if self._reading is None and not self._content(parsed):
                return parsed
            called = self._read()
            parsed += self._source.found
            self._source.found.clear()
            if called is None:
                return parsed
            self._reading = None
            if called:
                self._after_call = True
                continue
            self._plain = self.syntax.anchored
            parsed.append(self._taken(len(self.syntax.opening)))

    def _content(self, parsed: Parsed) -> bool:
        """Take the content before the next call; return whether one may begin."""
        start = self._find()
        text = self._source.text
        end = start if start >= 0 else len(text) - (0 if self._source.final else self._held_back())
        shown = self._clean(self._taken(end))
        if shown:
            parsed.append(shown)
        self._plain |= self.syntax.anchored and bool(shown.strip())
        return start >= 0

    def _read(self) -> bool | None:
        """Go on reading a call; return whether it was one, or None while that is not known."""
        if self._reading is None:
            self._reading = self.syntax.read(self._source)
        try:
            next(self._reading)
        except StopIteration as ended:
            return bool(ended.value)
        except (ValueError, RecursionError):
            return False
        return None

    def _taken(self, length: int) -> str:
        taken = self._source.text[:length]
        self._source.drop(length)
        return taken

    def _find(self) -> int:
        """Return where the next call begins, or -1."""
        text = self._source.text
        start = text.find(self.syntax.opening)
        if not self.syntax.anchored or start < 0:
            return start
        before = _without_first(self.syntax.noise, text[:start]).strip(SEPARATORS if self._after_call else None)
        return -1 if self._plain or before else start

    def _held_back(self) -> int:
        return held_back(self._source.text, (self.syntax.opening, *self.syntax.noise))

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

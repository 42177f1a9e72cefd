"""Reasoning apart from the answer: the text between `<think>` and `</think>` with which an answer begins.

Pure: text in, reasoning and content out. Qwen3 writes both marks, DeepSeek-R1's template has the first in the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.api.marks import held_back

OPENING, CLOSING = "<think>", "</think>"


def reasons(name: str, template: str | None) -> bool:
    """Whether answers may begin with reasoning; for `auto` as the model's chat template shows."""
    return name == "think" or (name == "auto" and CLOSING in (template or ""))


@dataclass(slots=True)
class ReasoningSplitter:
    """Takes an answer's text in pieces; text that may be the start of a mark is held back.

    Attributes:
        inside: the answer goes on with reasoning, as the prompt ends with the opening mark.
    """

    inside: bool
    _begun: bool = False
    _done: bool = False
    _fresh: bool = False  # just behind the opening mark, whose line may end there
    _text: str = ""

    def push(self, text: str) -> tuple[str, str]:
        """Return the reasoning and the content that are certain with this piece."""
        return self._advance(text, final=False)

    def finish(self) -> tuple[str, str]:
        """Return the rest."""
        return self._advance("", final=True)

    def _advance(self, text: str, *, final: bool) -> tuple[str, str]:
        if self._done:
            return "", text
        self._text += text
        if not self._begun and not self._begin(final=final):
            return "", ""
        if self._fresh and self._text:
            self._text, self._fresh = self._text.removeprefix("\n"), False
        if not self.inside:
            self._done = True
            return "", self._take(len(self._text))
        end = self._text.find(CLOSING)
        if end < 0:
            held = 0 if final else held_back(self._text, [CLOSING])
            return self._take(len(self._text) - held), ""
        content = self._text[end + len(CLOSING) :].lstrip("\n")
        if not content and not final:  # the lines' ends before the answer may go on
            return self._take(end), ""
        reasoning = self._take(end)
        self._text, self._done = "", True
        return reasoning, content

    def _begin(self, *, final: bool) -> bool:
        """Find out whether the answer opens with the mark; return whether that is known."""
        begin = self._text.lstrip()
        if begin.startswith(OPENING):
            self.inside, self._fresh, self._text = True, True, begin[len(OPENING) :]
        elif OPENING.startswith(begin) and not final:
            return False
        self._begun = True
        return True

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        return taken

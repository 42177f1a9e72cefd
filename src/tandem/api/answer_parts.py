"""The parts of a chat's answer: reasoning, content and tool calls, told from each other in its text piece by piece."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass

from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import ChatBody
from tandem.api.output_processor import TextChunk
from tandem.api.prepared_request import PreparedSequence
from tandem.api.reasoning import OPENING, ReasoningSplitter
from tandem.api.tool_calls import Parsed, ToolCallParser
from tandem.api.tool_syntaxes import FORCED, CallFragment
from tandem.api.tools import answer_syntax


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    text: str


@dataclass(frozen=True, slots=True)
class ContentPart:
    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """More of a call. `name`: of the function, where the call begins; `arguments`: more of its JSON."""

    index: int
    id: str
    name: str | None
    arguments: str


Part = ReasoningPart | ContentPart | CallPart


class AnswerParts:
    """Takes the chunks of one answer. What has a grammar has no reasoning: the grammar is for all of its text.

    Attributes:
        finish_reason: of the latest chunk, where calls have one of their own.
    """

    def __init__(self, body: ChatBody, model: LoadedModel, sequence: PreparedSequence) -> None:
        self.finish_reason: str | None = None
        syntax = answer_syntax(body, model)
        opened = (sequence.prompt.text or "").rstrip().endswith(OPENING)
        reasons = model.reasons and sequence.request.grammar is None
        self._splitter = ReasoningSplitter(opened) if reasons else None
        self._parser = None if syntax is None else ToolCallParser(syntax)
        self._ids = model.tool_syntax or FORCED  # a call that was forced goes back into the model's own template too
        self._most_calls = 1 if body.parallel_tool_calls is False else None
        self._calls = 0
        self._call_id = ""

    def read(self, chunk: TextChunk) -> list[Part]:
        """Return the parts of the next chunk, in their order; equal neighbours are one."""
        last = chunk.finish_reason is not None
        reasoning, content = "", chunk.text
        if self._splitter is not None:
            reasoning, content = self._splitter.push(chunk.text)
            if last:
                rest = self._splitter.finish()
                reasoning, content = reasoning + rest[0], content + rest[1]
        parsed: Parsed = [content]
        if self._parser is not None:
            parsed = self._parser.push(content)
            if last:
                parsed += self._parser.finish()
        parts: list[Part] = [ReasoningPart(reasoning)] if reasoning else []
        for part in self._shown(parsed):
            if not (parts and _joined(parts, part)):
                parts.append(part)
        called = self._calls and chunk.finish_reason == "stop"
        self.finish_reason = "tool_calls" if called else chunk.finish_reason
        return parts

    def _shown(self, parsed: Parsed) -> Iterator[Part]:
        for one in parsed:
            if isinstance(one, CallFragment):
                if one.name is not None:
                    self._calls += 1
                    self._call_id = self._ids.id_prefix + secrets.token_hex(self._ids.id_chars)[: self._ids.id_chars]
                if self._most_calls is None or self._calls <= self._most_calls:
                    yield CallPart(self._calls - 1, self._call_id, one.name, one.arguments)
            elif one:
                yield ContentPart(one)


def _joined(parts: list[Part], part: Part) -> bool:
    """Join a part to the last one, if it goes on with that; return whether it does."""
    match parts[-1], part:
        case ContentPart(before), ContentPart(text):
            parts[-1] = ContentPart(before + text)
        case CallPart(index, call_id, name, before), CallPart(name=None, arguments=arguments):
            parts[-1] = CallPart(index, call_id, name, before + arguments)
        case _:
            return False
    return True

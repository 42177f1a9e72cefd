"""The parts of a chat's answer: reasoning, content and tool calls, told from each other in its text piece by piece."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import CalledFunction, ChatBody, MessageToolCall
from tandem.api.output_processor import TextChunk
from tandem.api.prepared_request import PreparedSequence
from tandem.api.reasoning import OPENING, ReasoningSplitter
from tandem.api.tool_calls import FORCED, ToolCall, ToolCallParser
from tandem.api.tools import answer_syntax


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """What one chunk came to."""

    reasoning: str
    content: str
    calls: list[MessageToolCall]
    finish_reason: str | None


class AnswerParts:
    """Takes the chunks of one answer. What has a grammar has no reasoning: the grammar is for all of its text."""

    def __init__(self, body: ChatBody, model: LoadedModel, sequence: PreparedSequence) -> None:
        syntax = answer_syntax(body, model)
        opened = (sequence.prompt.text or "").rstrip().endswith(OPENING)
        reasons = model.reasons and sequence.request.grammar is None
        self._splitter = ReasoningSplitter(opened) if reasons else None
        self._parser = None if syntax is None else ToolCallParser(syntax)
        self._ids = model.tool_syntax or FORCED  # a call that was forced goes back into the model's own template too
        self._count = 0

    def read(self, chunk: TextChunk, *, indexed: bool) -> AnswerPart:
        """Return the parts of the next chunk. `indexed`: calls have an index, as in a stream's events."""
        last = chunk.finish_reason is not None
        reasoning, content = "", chunk.text
        if self._splitter is not None:
            reasoning, content = self._splitter.push(chunk.text)
            if last:
                rest = self._splitter.finish()
                reasoning, content = reasoning + rest[0], content + rest[1]
        calls: list[ToolCall] = []
        if self._parser is not None:
            parsed = self._parser.push(content)
            content, calls = parsed.content, parsed.calls
            if last:
                end = self._parser.finish()
                content, calls = content + end.content, calls + end.calls
        shown = [self._shown(call, self._count + place if indexed else None) for place, call in enumerate(calls)]
        self._count += len(shown)
        called = self._count and chunk.finish_reason == "stop"
        return AnswerPart(reasoning, content, shown, "tool_calls" if called else chunk.finish_reason)

    def _shown(self, call: ToolCall, index: int | None) -> MessageToolCall:
        call_id = self._ids.id_prefix + secrets.token_hex(self._ids.id_chars)[: self._ids.id_chars]
        return MessageToolCall(index=index, id=call_id, function=CalledFunction(call.name, call.arguments))

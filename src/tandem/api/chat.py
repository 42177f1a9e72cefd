"""/v1/chat/completions: the prompt by the chat template, and the chat response objects."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType

from tandem.api.answer_parts import AnswerParts, CallPart, ContentPart, Part, ReasoningPart
from tandem.api.chat_prompt import render_chat
from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import (
    AssistantMessage,
    CalledFunction,
    ChatBody,
    ChatChoice,
    ChatChunkChoice,
    ChatDelta,
    ChatLogprobs,
    FunctionDelta,
    MessageToolCall,
    PromptLogprobs,
    TokenLogprob,
    ToolCallDelta,
    TopLogprob,
)
from tandem.api.output_processor import TextChunk, Token
from tandem.api.parsing import sampling_params
from tandem.api.prepared_request import PreparedRequest, Prompt, prepare_request
from tandem.api.response_builder import ChoiceFields, ResponseBuilder, finite
from tandem.api.structured import checked_grammar
from tandem.api.tools import answer_syntax, told_tools, tool_grammar
from tandem.errors import InvalidRequest
from tandem.wire.messages import TokenLogprobs


def count_chats(body: ChatBody) -> int:
    """Return the number of choices that are asked for."""
    return body.n or 1


async def prepare_chat(request_id: str, body: ChatBody, model: LoadedModel) -> PreparedRequest:
    """Raises InvalidRequest."""
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs may only be set together with logprobs: true", param="top_logprobs")
    grammar = await checked_grammar(body, model)
    forced = tool_grammar(body)
    if forced is not None:
        if grammar is not None:
            raise InvalidRequest("a call that must be made leaves no room for response_format", param="tool_choice")
        await model.grammars.check(forced, "tools")
        grammar = forced
    syntax = answer_syntax(body, model)
    if syntax is not None and syntax.special:
        body = msgspec.structs.replace(body, skip_special_tokens=False)  # they mark the calls
    prompt = await encode_chat(body, model)
    if not prompt.token_ids:
        raise InvalidRequest("the model's chat template makes an empty prompt of the messages", param="messages")
    limit = model.output_limit(len(prompt.token_ids), _max_tokens(body), model.defaults.max_tokens, "messages")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    sampling = sampling_params(body, limit, logprobs, model.card.seed, model.defaults.sampling)
    return await prepare_request(request_id, body, model, [(prompt, sampling)], grammar)


async def encode_chat(body: ChatBody, model: LoadedModel) -> Prompt:
    """Return the prompt that a body's messages and tools make. Raises InvalidRequest, Overloaded."""
    text = await render_chat(body, model, told_tools(body))
    keep = model.prompt_limit(body.truncate_prompt_tokens, _max_tokens(body))
    [token_ids] = await model.encoder.encode(
        [text], "messages", add_special_tokens=bool(body.add_special_tokens), keep=keep
    )
    return Prompt(token_ids, text)


class ChatBuilder(ResponseBuilder[ChatBody]):
    ID_PREFIX = "chatcmpl-"
    OBJECT = "chat.completion"
    CHUNK_OBJECT = "chat.completion.chunk"

    def __init__(self, request: PreparedRequest, body: ChatBody) -> None:
        super().__init__(request, body)
        self._answers = [AnswerParts(body, request.model, one) for one in request.sequences]

    def choice(self, chunk: TextChunk, first: bool) -> ChatChoice:
        parts, fields = self._read(chunk)
        calls = [
            MessageToolCall(id=part.id, function=CalledFunction(part.name or "", part.arguments))
            for part in parts
            if isinstance(part, CallPart)
        ]
        content = _text(parts, ContentPart)
        shown = None if calls and not content.strip() else content
        reasoning = _text(parts, ReasoningPart) or UNSET
        message = AssistantMessage(shown, reasoning_content=reasoning, tool_calls=calls or UNSET)
        return ChatChoice(**fields, message=message, logprobs=self._logprobs(chunk.tokens))

    def chunk_choice(self, chunk: TextChunk, first: bool) -> ChatChunkChoice:
        parts, fields = self._read(chunk)
        content = _text(parts, ContentPart)
        delta = ChatDelta(
            content if content or (first and not parts) else UNSET,
            "assistant" if first else UNSET,
            _text(parts, ReasoningPart) or UNSET,
            [_call_delta(part) for part in parts if isinstance(part, CallPart)] or UNSET,
        )
        return ChatChunkChoice(**fields, delta=delta, logprobs=self._logprobs(chunk.tokens))

    def _read(self, chunk: TextChunk) -> tuple[list[Part], ChoiceFields]:
        answer = self._answers[chunk.index]
        parts, fields = answer.read(chunk), self.choice_fields(chunk)
        fields["finish_reason"] = answer.finish_reason
        return parts, fields

    def prompt_token_ids(self) -> list[int] | UnsetType:
        return self.request.sequences[0].prompt.token_ids if self.body.return_token_ids else UNSET

    def prompt_logprobs(self, chunk: TextChunk) -> PromptLogprobs | UnsetType:
        if self.body.prompt_logprobs is None:
            return UNSET
        return self.ranked(self.request.sequences[chunk.index].prompt, chunk, self.body.prompt_logprobs)

    def _logprobs(self, tokens: list[Token]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        return ChatLogprobs([self._token(token.id, token.logprobs) for token in tokens if token.logprobs is not None])

    def _token(self, token_id: int, logprobs: TokenLogprobs) -> TokenLogprob:
        top = [TopLogprob(*self._names(other, value)) for other, value in logprobs.top]
        return TokenLogprob(*self._names(token_id, logprobs.logprob), top)

    def _names(self, token_id: int, logprob: float) -> tuple[str, float, list[int]]:
        tokenizer = self.request.model.tokenizer
        return tokenizer.token_text(token_id), finite(logprob), list(tokenizer.token_bytes(token_id))


def _text(parts: list[Part], kind: type[ContentPart | ReasoningPart]) -> str:
    return "".join(part.text for part in parts if isinstance(part, kind))


def _call_delta(part: CallPart) -> ToolCallDelta:
    begins = part.name is not None
    function = FunctionDelta(part.name if part.name is not None else UNSET, part.arguments)
    return ToolCallDelta(part.index, part.id if begins else UNSET, "function" if begins else UNSET, function)


def _max_tokens(body: ChatBody) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise InvalidRequest(
            f"max_tokens ({old}) and max_completion_tokens ({new}) mean the same; set one", param="max_tokens"
        )
    return old if new is None else new

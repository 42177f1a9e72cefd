"""Turn text chunks into OpenAI's response objects: the part that both APIs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypedDict

import msgspec
from msgspec import UNSET, UnsetType

from tandem.api.backend import ServingDetails
from tandem.api.openai import Body, Choice, PromptLogprobs, PromptTokensDetails, RankedLogprob, ResponseBody, Usage
from tandem.api.output_processor import TextChunk
from tandem.api.prepared_request import PreparedRequest, Prompt
from tandem.wire.messages import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class ChoiceFields(TypedDict):
    index: int
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType


class ResponseHead(TypedDict):
    id: str
    object: str
    created: int
    model: str


class ResponseBuilder(ABC, Generic[Body]):
    """Builds the response to one request.

    Attributes:
        ID_PREFIX, OBJECT, CHUNK_OBJECT: begin of the ids, and types, of the API's responses.
    """

    ID_PREFIX: str
    OBJECT: str
    CHUNK_OBJECT: str

    def __init__(self, request: PreparedRequest, body: Body) -> None:
        self.request = request
        self.body = body
        self._id = self.ID_PREFIX + request.request_id
        self._begun: set[int] = set()
        options = body.stream_options
        self.usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)

    def whole(self, chunks: list[TextChunk]) -> ResponseBody:
        """Return the whole response, from one chunk for each choice."""
        return ResponseBody(
            **self._head(self.OBJECT),
            choices=[self.choice(chunk, first=True) for chunk in chunks],
            usage=self._usage(),
            tandem=self._details(),
            prompt_token_ids=self.prompt_token_ids(),
            prompt_logprobs=self.prompt_logprobs(chunks[0]),
            kv_transfer_params=chunks[0].kv_transfer_params or UNSET,
        )

    def event(self, chunk: TextChunk) -> ResponseBody:
        """Return one event of a stream."""
        first_event, first_of_choice = not self._begun, chunk.index not in self._begun
        self._begun.add(chunk.index)
        return ResponseBody(
            **self._head(self.CHUNK_OBJECT),
            choices=[self.chunk_choice(chunk, first_of_choice)],
            usage=self._usage() if self._usage_always else None if self.usage_at_end else UNSET,
            tandem=UNSET if chunk.finish_reason is None else chunk.details,
            prompt_token_ids=self.prompt_token_ids() if first_event else UNSET,
            prompt_logprobs=self.prompt_logprobs(chunk) if first_event else UNSET,
            kv_transfer_params=chunk.kv_transfer_params or UNSET,
        )

    def usage_event(self) -> ResponseBody:
        """Return the last event of a stream with `stream_options.include_usage`."""
        return ResponseBody(**self._head(self.CHUNK_OBJECT), choices=[], usage=self._usage(), tandem=self._details())

    @abstractmethod
    def choice(self, chunk: TextChunk, first: bool) -> Choice: ...

    @abstractmethod
    def chunk_choice(self, chunk: TextChunk, first: bool) -> Choice: ...

    def prompt_token_ids(self) -> list[int] | UnsetType:
        """Return what the whole response has, beside its choices."""
        return UNSET

    def prompt_logprobs(self, chunk: TextChunk) -> PromptLogprobs | UnsetType:
        """Return what the whole response has, beside its choices."""
        return UNSET

    def ranked(self, prompt: Prompt, chunk: TextChunk, most: int) -> PromptLogprobs:
        """Return how likely the prompt's tokens were, and up to `most` others, as vLLM writes it."""
        text = self.request.model.tokenizer.token_text
        found: PromptLogprobs = [None]
        for token, one in zip(prompt.token_ids[1:], chunk.prompt_logprobs or [], strict=True):
            ranked = {str(other): (value, rank) for rank, (other, value) in enumerate(one.top[:most], 1)}
            ranked.setdefault(str(token), (one.logprob, one.rank))
            found.append(
                {other: RankedLogprob(finite(value), rank, text(int(other))) for other, (value, rank) in ranked.items()}
            )
        return found

    def choice_fields(self, chunk: TextChunk) -> ChoiceFields:
        ids = [token.id for token in chunk.tokens] if self.body.return_token_ids else UNSET
        return ChoiceFields(
            index=chunk.index, finish_reason=chunk.finish_reason, stop_reason=chunk.stop_reason, token_ids=ids
        )

    def _head(self, object_name: str) -> ResponseHead:
        model = self.request.model.card.name
        return ResponseHead(id=self._id, object=object_name, created=self.request.created, model=model)

    def _details(self) -> ServingDetails | list[ServingDetails | None] | None:
        details = [one.output.details for one in self.request.sequences]
        return details[0] if len(details) == 1 else details

    def _usage(self) -> Usage:
        cached = sum(
            max(one.output.details.prefix_tokens.values(), default=0)
            for one in self.request.sequences
            if one.first_of_prompt and one.output.details is not None
        )
        prompt, output = self.request.prompt_tokens, self.request.output_tokens
        return Usage(prompt, output, prompt + output, PromptTokensDetails(cached))


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def with_chosen(token_id: int, logprobs: TokenLogprobs, most: int) -> list[tuple[int, float]]:
    """Return up to `most` of the most likely tokens, and the chosen one if it is none of them."""
    top = logprobs.top[:most]
    if any(other == token_id for other, _ in top):
        return top
    return [*top, (token_id, logprobs.logprob)]


encode = msgspec.json.Encoder().encode

"""Pieces of choices to OpenAI's objects; what both APIs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypedDict

import msgspec
from msgspec import UNSET, UnsetType

from tandem.api.backend import ServingDetails
from tandem.api.openai import Answer, Choice, PromptTokensDetails, Usage
from tandem.api.output import TextChunk
from tandem.api.prepared_request import PreparedRequest
from tandem.wire.messages import KvTransferParams, TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class ChoiceFields(TypedDict):
    index: int
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: list[int] | UnsetType


class ResponseBuilder(ABC):
    """Makes the answer to one job.

    Attributes:
        ID_PREFIX, OBJECT, CHUNK_OBJECT: how the API names its responses.
    """

    ID_PREFIX: str
    OBJECT: str
    CHUNK_OBJECT: str

    def __init__(self, job: PreparedRequest) -> None:
        self.job = job
        self._id = self.ID_PREFIX + job.caller.request_id
        self._begun: set[int] = set()
        options = job.body.stream_options
        self.usage_at_end = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)

    def whole(self, pieces: list[TextChunk]) -> Answer:
        """The response, from one piece for each choice."""
        return self._answer(
            self.OBJECT,
            [self.choice(piece, first=True) for piece in pieces],
            usage=self._usage(),
            tandem=self._how(),
            kv_transfer_params=pieces[0].kv_transfer_params,
            first=True,
        )

    def event(self, piece: TextChunk) -> Answer:
        """One event of a stream."""
        first = piece.index not in self._begun
        begins = not self._begun
        self._begun.add(piece.index)
        return self._answer(
            self.CHUNK_OBJECT,
            [self.chunk_choice(piece, first)],
            usage=self._usage() if self._usage_always else None if self.usage_at_end else UNSET,
            tandem=UNSET if piece.finish_reason is None else piece.how,
            kv_transfer_params=piece.kv_transfer_params,
            first=begins,
        )

    def usage_event(self) -> Answer:
        """The last event of a stream with `stream_options.include_usage`."""
        return self._answer(self.CHUNK_OBJECT, [], usage=self._usage(), tandem=self._how())

    @abstractmethod
    def choice(self, piece: TextChunk, first: bool) -> Choice: ...

    @abstractmethod
    def chunk_choice(self, piece: TextChunk, first: bool) -> Choice: ...

    def prompt_token_ids(self) -> list[int] | UnsetType:
        """Of the whole answer."""
        return UNSET

    def choice_fields(self, piece: TextChunk) -> ChoiceFields:
        ids = [token.id for token in piece.tokens] if self.job.body.return_token_ids else UNSET
        return ChoiceFields(
            index=piece.index, finish_reason=piece.finish_reason, stop_reason=piece.stop_reason, token_ids=ids
        )

    def _answer(
        self,
        kind: str,
        choices: list[Choice],
        usage: Usage | UnsetType | None,
        tandem: ServingDetails | list[ServingDetails | None] | UnsetType | None,
        kv_transfer_params: KvTransferParams | None = None,
        first: bool = False,
    ) -> Answer:
        return Answer(
            id=self._id,
            object=kind,
            created=self.job.created,
            model=self.job.model.card.name,
            choices=choices,
            usage=usage,
            tandem=tandem,
            prompt_token_ids=self.prompt_token_ids() if first else UNSET,
            kv_transfer_params=UNSET if kv_transfer_params is None else kv_transfer_params,
        )

    def _how(self) -> ServingDetails | list[ServingDetails | None] | None:
        made = [one.output.how for one in self.job.sequences]
        return made[0] if len(made) == 1 else made

    def _usage(self) -> Usage:
        cached = 0
        for one in self.job.sequences:
            if one.first_of_prompt and one.output.how is not None:
                cached += max(one.output.how.prefix_tokens.values(), default=0)
        prompt, output = self.job.prompt_tokens, self.job.output_tokens
        return Usage(prompt, output, prompt + output, PromptTokensDetails(cached))


def finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)


def with_chosen(token_id: int, logprobs: TokenLogprobs) -> list[tuple[int, float]]:
    """The most likely tokens, and the chosen one if it is none of them."""
    if any(other == token_id for other, _ in logprobs.top):
        return logprobs.top
    return [*logprobs.top, (token_id, logprobs.logprob)]


encode = msgspec.json.Encoder().encode

"""Turn a sequence's tokens into text, up to a stop string."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from tandem.api.backend import ServingDetails, TokenDelta
from tandem.api.detokenizer import Detokenizer
from tandem.api.stop_strings import StopPatterns, StopStrings
from tandem.wire.messages import KvTransferParams, TokenLogprobs
from tandem.wire.sampling import SamplingParams


class Token(NamedTuple):
    """`offset`: characters of the sequence's text before it."""

    id: int
    offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class TextChunk:
    """The next part of a choice; the last one has a finish reason.

    Attributes:
        index: the choice.
        text: may be shorter than the tokens' text (held back, or cut at a stop string), then or later.
        tokens: new tokens, the one that ended the sequence too.
        stop_reason: the stop string or stop token id.
        prompt_logprobs: of the prompt's tokens after the first, once.
    """

    index: int
    text: str
    tokens: list[Token]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    details: ServingDetails | None = None
    kv_transfer_params: KvTransferParams | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None


class OutputProcessor:
    """Takes a sequence's deltas one after the other.

    Args:
        detokenizer: a new one.
        index: of the choice.
        stops: stop strings, if there are any.
        sampling: text of the first `min_tokens` tokens is not searched for stop strings; `stop_token_ids` tell a stop
            token that the client named from end-of-sequence.
        silent: the client wants no output at all, though engines make one token at least.
        keeps_stop: the stop string or stop token is part of the text.

    Attributes:
        token_count: tokens so far, those that stopped it included.
        details: the newest that is known of how the sequence was made.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        index: int,
        stops: StopPatterns | None,
        sampling: SamplingParams,
        keeps_stop: bool = False,
        silent: bool = False,
    ) -> None:
        self.token_count = 0
        self.details: ServingDetails | None = None
        self._index = index
        self._sampling = sampling
        self._keeps_stop = keeps_stop
        self._silent = silent
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops) if stops is not None else None
        self._length = 0

    def process(self, delta: TokenDelta) -> TextChunk:
        """Return the next chunk. Tokens after one that completes a stop string are dropped, however they came."""
        self.details = delta.details or self.details
        if self._silent:
            reason = None if delta.finish_reason is None else "length"
            chunk = TextChunk(self._index, "", [], reason, details=self.details)
        else:
            chunk = self._process(delta)
        return dataclasses.replace(chunk, prompt_logprobs=delta.prompt_logprobs) if delta.prompt_logprobs else chunk

    def _process(self, delta: TokenDelta) -> TextChunk:
        text, tokens, hit = "", [], None
        for place, token_id in enumerate(delta.token_ids):
            tokens.append(Token(token_id, self._length, delta.logprobs[place] if delta.logprobs else None))
            self.token_count += 1
            last = place == len(delta.token_ids) - 1
            ends = last and delta.stop_token_id is not None and not self._keeps_stop
            shown, hit = self._search("" if ends else self._detokenizer.push(token_id))
            text += shown
            if hit is not None:
                return self._last_chunk(delta, text, tokens, "stop", hit)
        if delta.finish_reason is None:
            return TextChunk(self._index, text, tokens)
        shown, hit = self._search(self._detokenizer.finish())
        if hit is not None:
            return self._last_chunk(delta, text + shown, tokens, "stop", hit)
        rest = self._stops.flush() if self._stops is not None else ""
        stop = delta.stop_token_id if delta.stop_token_id in self._sampling.stop_token_ids else None
        return self._last_chunk(delta, text + shown + rest, tokens, delta.finish_reason, stop)

    def _search(self, text: str) -> tuple[str, str | None]:
        """Return the text that may be shown now, and the stop string that it completes."""
        self._length += len(text)
        if self._stops is None or self.token_count <= self._sampling.min_tokens:
            return text, None
        shown, hit = self._stops.push(text)
        return (shown + hit if hit is not None and self._keeps_stop else shown), hit

    def _last_chunk(
        self, delta: TokenDelta, text: str, tokens: list[Token], finish_reason: str, stop_reason: str | int | None
    ) -> TextChunk:
        return TextChunk(self._index, text, tokens, finish_reason, stop_reason, self.details, delta.kv_transfer_params)


def joined(chunks: list[TextChunk]) -> TextChunk:
    """Return all chunks of one choice as one."""
    return dataclasses.replace(
        chunks[-1],
        text="".join(chunk.text for chunk in chunks),
        tokens=[token for chunk in chunks for token in chunk.tokens],
        prompt_logprobs=next((chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs), None),
    )

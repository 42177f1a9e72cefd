"""What a sequence says: its tokens as text, up to a stop string."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tandem.api.backend import ServingDetails, TokenDelta
from tandem.api.detokenizer import new_detokenizer
from tandem.api.stops import StopStrings
from tandem.api.tokens import Tokenizer
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
    """

    index: int
    text: str
    tokens: list[Token]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    how: ServingDetails | None = None
    kv_transfer_params: KvTransferParams | None = None


class Output:
    """Takes a sequence's deltas one after the other.

    Args:
        index: of the choice.
        stops: stop strings.
        sampling: text of the first `min_tokens` tokens is not searched for stop strings; `stop_token_ids` tell a stop
            token that the client named from end-of-sequence.

    Attributes:
        token_count: tokens so far, those that stopped it included.
        how: the newest word on how it was made.
    """

    def __init__(self, tokenizer: Tokenizer, index: int, stops: list[str], sampling: SamplingParams) -> None:
        self.token_count = 0
        self.how: ServingDetails | None = None
        self._index = index
        self._sampling = sampling
        self._detokenizer = new_detokenizer(tokenizer)
        self._stops = StopStrings(stops) if stops else None
        self._length = 0

    def feed(self, delta: TokenDelta) -> TextChunk:
        """The next piece. Tokens after the one that completes a stop string are dropped, however they were batched."""
        self.how = delta.how or self.how
        text, tokens, hit = "", [], None
        for place, token_id in enumerate(delta.token_ids):
            tokens.append(Token(token_id, self._length, delta.logprobs[place] if delta.logprobs else None))
            self.token_count += 1
            ends = delta.stop_token_id is not None and place == len(delta.token_ids) - 1
            shown, hit = self._show("" if ends else self._detokenizer.push(token_id))
            text += shown
            if hit is not None:
                break
        if delta.finish_reason is not None and hit is None:
            shown, hit = self._show(self._detokenizer.finish())
            text += shown
        return self._piece(delta, text, tokens, hit)

    def _show(self, text: str) -> tuple[str, str | None]:
        self._length += len(text)
        if self._stops is None or self.token_count <= self._sampling.min_tokens:
            return text, None
        return self._stops.push(text)

    def _piece(self, delta: TokenDelta, text: str, tokens: list[Token], hit: str | None) -> TextChunk:
        if hit is None and delta.finish_reason is None:
            return TextChunk(self._index, text, tokens)
        if hit is None and self._stops is not None:
            text += self._stops.flush()
        finish_reason = delta.finish_reason if hit is None else "stop"
        stop_reason = self._stop_token(delta) if hit is None else hit
        return TextChunk(self._index, text, tokens, finish_reason, stop_reason, self.how, delta.kv_transfer_params)

    def _stop_token(self, delta: TokenDelta) -> int | None:
        return delta.stop_token_id if delta.stop_token_id in self._sampling.stop_token_ids else None


def joined(pieces: list[TextChunk]) -> TextChunk:
    """All pieces of one choice as one."""
    last = pieces[-1]
    return TextChunk(
        index=last.index,
        text="".join(piece.text for piece in pieces),
        tokens=[token for piece in pieces for token in piece.tokens],
        finish_reason=last.finish_reason,
        stop_reason=last.stop_reason,
        how=last.how,
        kv_transfer_params=last.kv_transfer_params,
    )

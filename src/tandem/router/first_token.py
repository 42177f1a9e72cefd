"""First-token routing: the prefill engine sends the first token of a request, the decode engine the others."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from tandem.wire.messages import TokenLogprobs, Tokens


@dataclass(slots=True)
class OutputMerger:
    """Puts the output of one request in order, over both engines of a route and over all attempts.

    The index of each token in the output decides: token 0 comes from the prefill engine, and tokens of the decode
    engine that overtake it wait. A token that came already (a decode engine that computed the prompt itself sends
    token 0 too) is dropped.
    """

    started: float
    tokens: list[int] = field(default_factory=list)
    first_token_at: float = 0.0
    _early: dict[int, tuple[int, TokenLogprobs | None]] = field(default_factory=dict)

    @property
    def has_gap(self) -> bool:
        """Whether tokens wait for one before them."""
        return bool(self._early)

    def forget_early(self) -> None:
        """Drop the tokens that wait: another attempt makes them again."""
        self._early.clear()

    def add(self, message: Tokens) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Return the tokens that are next in line now, with their log-probabilities."""
        for offset, token in enumerate(message.token_ids):
            index = message.index + offset
            if index >= len(self.tokens):
                self._early[index] = (token, message.logprobs[offset] if message.logprobs else None)
        begin = len(self.tokens)
        logprobs: list[TokenLogprobs] = []
        while (early := self._early.pop(len(self.tokens), None)) is not None:
            token, logprob = early
            self.tokens.append(token)
            if logprob is not None:
                logprobs.append(logprob)
        if self.tokens and not self.first_token_at:
            self.first_token_at = time.monotonic()
        return self.tokens[begin:], logprobs or None

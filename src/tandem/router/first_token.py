"""First-token routing: the prefill engine sends the first token of a request, the decode engine the others."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from tandem.errors import Diverged
from tandem.ids import output_digest
from tandem.wire.messages import PromptScores, TokenLogprobs, Tokens


@dataclass(slots=True)
class OutputMerger:
    """Puts the output of one request in order, over both engines of a route and over all attempts.

    The index of each token in the output decides: token 0 comes from the prefill engine, and tokens of the decode
    engine that overtake it wait. A token that came already (a decode engine that computed the prompt itself sends
    token 0 too) is dropped, if it is the same one.

    The text has one author: every message brings the digest of the output that its tokens go on from. Two engines may
    choose different tokens of the same text (in bfloat16, with another tp or in another batch), and what the one made
    after its own choice must not follow the choice of the other.

    Attributes:
        tokens: the output so far, as the client has it.
        first_token_at: 0 until there is one.
        prompt_logprobs: of the prompt's tokens after the first; whichever engine sent each first.
    """

    started: float
    tokens: list[int] = field(default_factory=list)
    first_token_at: float = 0.0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    _digests: list[int] = field(default_factory=lambda: [0])  # by number of tokens, from none to all
    _early: list[tuple[int, int, Tokens]] = field(default_factory=list)
    _arrivals: Iterator[int] = field(default_factory=itertools.count)

    @property
    def has_gap(self) -> bool:
        """Whether tokens wait for one before them."""
        return bool(self._early)

    def forget_early(self) -> None:
        """Drop the tokens that wait: another attempt makes them again."""
        self._early.clear()

    def add(self, message: Tokens) -> tuple[list[int], list[TokenLogprobs] | None]:
        """Return the tokens that are next in line now, with their log-probabilities.

        Raises Diverged if they are not of the same text; then none of this message has been added.
        """
        heappush(self._early, (message.index, next(self._arrivals), message))
        begin = len(self.tokens)
        logprobs: list[TokenLogprobs] = []
        while self._early and self._early[0][0] <= len(self.tokens):
            _, _, due = heappop(self._early)
            known = len(self.tokens) - due.index
            self._check(due)
            self._append(due.token_ids[known:])
            if due.logprobs is not None:
                logprobs += due.logprobs[known:]
        if self.tokens and not self.first_token_at:
            self.first_token_at = time.monotonic()
        return self.tokens[begin:], logprobs or None

    def add_scores(self, message: PromptScores) -> None:
        """Take the log-probabilities that are next; those of a prompt that is computed again are known."""
        known = len(self.prompt_logprobs) + 1 - message.start
        self.prompt_logprobs += message.logprobs[known:] if known >= 0 else []

    def _append(self, token_ids: list[int]) -> None:
        for token in token_ids:
            self.tokens.append(token)
            self._digests.append(output_digest([token], self._digests[-1]))

    def _check(self, message: Tokens) -> None:
        """Raise Diverged if a message that goes on from known tokens is of another text than they."""
        index = message.index
        if message.token_ids and message.digest != self._digests[index]:
            raise Diverged(f"token {index} of the output goes on from another text than the client has")
        for place, (known, token) in enumerate(zip(self.tokens[index:], message.token_ids, strict=False), index):
            if known != token:
                raise Diverged(f"token {place} of the output is {known}, and came again as {token}")

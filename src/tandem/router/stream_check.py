"""The bounds of what an engine may send about a request. Pure.

An engine that breaks them is broken or hostile, and its words must reach neither a client nor the code that turns them
into text.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tandem.errors import EngineFailed
from tandem.wire.messages import Generate, Prefill, PromptScores, PullKv, TokenLogprobs, Tokens

FINISH_REASONS = ("stop", "length")
_SHOWN = 40  # characters of a text that came


@dataclass(slots=True)
class StreamCheck:
    """The messages of one engine about one request, in order: one token after the other, up to one end.

    Attributes:
        engine_id: for people.
        vocab_size: of its registration.
        next: position in the output of the next token; None before the first message.
        scored: position in the prompt of the token whose log-probability is next.
        ended: nothing may follow.
    """

    generate: Generate
    engine_id: str
    vocab_size: int
    next: int | None = None
    scored: int = 1
    ended: bool = False

    def take(self, message: Tokens) -> None:
        """Take note of the next message. Raises EngineFailed that names what came if it is out of bounds."""
        problem = self._place(message) or self._content(message) or self._end(message)
        if problem is not None:
            raise EngineFailed(f"engine {self.engine_id} sent what no engine may send: {problem}")
        if message.token_ids:
            self.next = message.index + len(message.token_ids)
        self.ended = message.done

    def take_scores(self, message: PromptScores) -> None:
        """Take note of log-probabilities of the prompt. Raises EngineFailed if they are out of bounds."""
        problem = self._scores(message)
        if problem is not None:
            raise EngineFailed(f"engine {self.engine_id} sent what no engine may send: {problem}")
        self.scored += len(message.logprobs)

    def _scores(self, message: PromptScores) -> str | None:
        wanted, end = self.generate.sampling.prompt_logprobs, message.start + len(message.logprobs)
        if wanted is None:
            return "log-probabilities of the prompt that nobody asked for"
        if self.ended or self.next is not None:
            return "log-probabilities of the prompt after its first token"
        if message.start != self.scored or end > self.generate.prompt_len:
            return (
                f"log-probabilities of tokens {message.start} to {end - 1} of the prompt where {self.scored} was next"
            )
        return next((problem for one in message.logprobs if (problem := self._logprobs(one, wanted))), None)

    def is_copy(self, message: Tokens) -> bool:
        """Return whether a decode engine has ended with the first token, of which it does not know how likely it was.

        The prefill engine chose that token, and sends it too.
        """
        pulled_first = isinstance(self.generate.kv, PullKv) and message.index == self._start
        ended = message.finish_reason is not None and len(message.token_ids) == 1
        sampling = self.generate.sampling
        lacks_own = sampling.logprobs is not None and message.logprobs is None
        lacks_prompts = sampling.prompt_logprobs is not None and self.scored < self.generate.prompt_len
        return pulled_first and ended and (lacks_own or lacks_prompts)

    @property
    def _start(self) -> int:
        """Number of output tokens that came with the request."""
        return len(self.generate.token_ids) - self.generate.prompt_len

    def _place(self, message: Tokens) -> str | None:
        if self.ended:
            return "more after its end"
        if not message.token_ids:
            return None if message.done else "a message without tokens and without an end"
        # Where the first token comes from the prefill engine, the decode engine begins after it.
        first = (self._start, self._start + isinstance(self.generate.kv, PullKv))
        low, high = first if self.next is None else (self.next, self.next)
        if not low <= message.index <= high:
            return f"token {message.index} of the output where token {low} was next"
        most = self._start + 1 if isinstance(self.generate.kv, Prefill) else self.generate.sampling.max_tokens
        if message.index + len(message.token_ids) > most:
            return f"{message.index + len(message.token_ids)} tokens, of at most {most}"
        return None

    def _content(self, message: Tokens) -> str | None:
        if (token := self._foreign(message.token_ids)) is not None:
            return f"token {token}, of a vocabulary of {self.vocab_size}"
        wanted = self.generate.sampling.logprobs
        if wanted is None:
            return None if message.logprobs is None else "log-probabilities that nobody asked for"
        if self.is_copy(message):
            return None
        came = message.logprobs or []
        if len(came) != len(message.token_ids):
            return f"log-probabilities of {len(came)} tokens with {len(message.token_ids)} tokens"
        return next((problem for one in came if (problem := self._logprobs(one, wanted)) is not None), None)

    def _logprobs(self, one: TokenLogprobs, wanted: int) -> str | None:
        if len(one.top) > wanted:
            return f"the {len(one.top)} most likely tokens, of at most {wanted}"
        if (token := self._foreign([token for token, _ in one.top])) is not None:
            return f"the log-probability of token {token}, of a vocabulary of {self.vocab_size}"
        if any(math.isnan(value) for value in (one.logprob, *(value for _, value in one.top))):
            return "a log-probability that is not a number"
        return None

    def _end(self, message: Tokens) -> str | None:
        reason, last = message.finish_reason, message.token_ids[-1:]
        if reason is None:
            if message.stop_token_id is not None:
                return "a stop token without an end"
            ends_early = message.done and not self._leaves_rest(message)
            return "the end of its part without a finish reason" if ends_early else None
        if reason not in FINISH_REASONS:
            return f"finish reason {reason[:_SHOWN]!r}, which is none of {', '.join(FINISH_REASONS)}"
        if not message.done or not last:
            return f"finish reason {reason} without {'an end' if last else 'a token'}"
        if message.stop_token_id not in (None, *last):
            return f"stop token {message.stop_token_id}, which is not the last token"
        return None

    def _leaves_rest(self, message: Tokens) -> bool:
        """Return whether the other engine has to send the end of the request."""
        return isinstance(self.generate.kv, Prefill) and (bool(message.token_ids) or self.next is not None)

    def _foreign(self, token_ids: list[int]) -> int | None:
        """Return the first id that is not in the vocabulary."""
        return next((token for token in token_ids if not 0 <= token < self.vocab_size), None)

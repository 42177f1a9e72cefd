"""Turn the texts of a request into token ids: in pieces of bounded work, and no text that cannot fit the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tandem.api.http_errors import ContextTooLong
from tandem.api.text_pool import TextPool
from tandem.api.tokenizer import Tokenizer

INLINE_CHARS = 4096
"""Longer texts are tokenized on a thread: about 1 us a character would stall the streams."""
INLINE_TEXTS = 16
PIECE_CHARS = 2**16
PIECE_TEXTS = 256
CHARS_A_TOKEN = 8
MARGIN = 64  # tokens
MAX_TAIL_CHARS = 2**20
SHORTENING = 4
"""A normalizer may make a text so many times shorter (composed characters, runs of spaces)."""


class PromptEncoder:
    """Tokenizes for one model.

    Attributes:
        max_chars: of a text; one with more has more than `max_model_len` tokens even if each is the longest there is.
    """

    def __init__(self, tokenizer: Tokenizer, pool: TextPool, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._pool = pool
        self._max_tokens = max_model_len
        self.max_chars = max_model_len * tokenizer.longest_token * (SHORTENING if tokenizer.normalizes else 1)

    async def encode(
        self, texts: Sequence[str], field: str, *, add_special_tokens: bool, keep: int | None = None
    ) -> list[list[int]]:
        """Return the token ids of each text; `field` of the body has them. Raises ContextTooLong, Overloaded.

        Args:
            keep: only so many of the last ones of each.
        """
        if keep is not None:
            return [await self._encode_last(text, keep, field, add_special_tokens) for text in texts]
        for text in texts:
            self.check_length(len(text), field)
        if len(texts) <= INLINE_TEXTS and sum(map(len, texts)) <= INLINE_CHARS:
            return self._encode(texts, add_special_tokens)
        found: list[list[int]] = []
        for batch in _batches(texts):
            if len(batch[0]) > PIECE_CHARS:
                await self._check_tokens(batch[0], field)
            found += await self._pool.run(self._encode, batch, add_special_tokens)
        return found

    async def _encode_last(self, text: str, count: int, field: str, add_special_tokens: bool) -> list[int]:
        """Return the last `count` token ids of a text, of which no more is looked at than that takes."""
        chars = CHARS_A_TOKEN * (count + MARGIN)
        while True:
            tail = text[-min(chars, MAX_TAIL_CHARS) :]
            ids, total = await self._pool.run(
                self._tokenizer.encode_last, tail, count, add_special_tokens=add_special_tokens
            )
            # Where the text was cut there may be tokens that the whole of it does not have, but not many.
            if len(tail) == len(text) or total >= count + MARGIN:
                return ids
            if len(tail) == MAX_TAIL_CHARS:
                raise ContextTooLong(
                    f"{field} has {len(text)} characters, of which the last {MAX_TAIL_CHARS} have fewer tokens than the"
                    f" {count} of truncate_prompt_tokens; send less text",
                    param=field,
                )
            chars *= 2

    def check_length(self, chars: int, field: str) -> None:
        """Raise ContextTooLong for a text of so many characters that it cannot fit."""
        if chars > self.max_chars:
            raise ContextTooLong(
                f"{field} has {chars} characters; at most {self.max_chars} can fit into this model's"
                f" {self._max_tokens} tokens",
                param=field,
            )

    async def _check_tokens(self, text: str, field: str) -> None:
        """Raise ContextTooLong if a long text has too many tokens, by its pieces, so that it is not all looked at.

        A cut may add the tokens of two halves of one token, which are no more than its bytes.
        """
        slack = 2 * self._tokenizer.longest_token
        tokens = 0
        for start in range(0, len(text), PIECE_CHARS):
            [ids] = await self._pool.run(self._encode, [text[start : start + PIECE_CHARS]], False)
            tokens += max(0, len(ids) - slack)
            if tokens > self._max_tokens:
                raise ContextTooLong(
                    f"{field} has {len(text)} characters, of which the first {start + PIECE_CHARS} are more than the"
                    f" {self._max_tokens} tokens that this model takes",
                    param=field,
                )

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        return [self._tokenizer.encode(text, add_special_tokens=add_special_tokens) for text in texts]


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the texts in batches of about PIECE_CHARS; a longer one is alone."""
    batch: list[str] = []
    chars = 0
    for text in texts:
        if batch and (chars + len(text) > PIECE_CHARS or len(batch) == PIECE_TEXTS):
            yield batch
            batch, chars = [], 0
        batch.append(text)
        chars += len(text)
    if batch:
        yield batch

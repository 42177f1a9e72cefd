"""Turn token ids into text, one token at a time."""

from __future__ import annotations

import codecs
from typing import Protocol

from tandem.api.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_CHAR_TOKENS = 4  # a character has up to four bytes in UTF-8, each of which may be a token


class Detokenizer(Protocol):
    """The texts of `push` and then `finish`, joined, are the text of all the tokens, special ones if they are shown."""

    def push(self, token_id: int) -> str:
        """Return the characters that are complete with this token."""

    def finish(self) -> str:
        """Return the rest; bytes that are no character become U+FFFD."""


def new_detokenizer(tokenizer: Tokenizer, *, skip_special_tokens: bool = True) -> Detokenizer:
    kind = ByteDetokenizer if tokenizer.is_byte_level else WindowDetokenizer
    return kind(tokenizer, tokenizer.special_ids if skip_special_tokens else frozenset())


def text_offsets(tokenizer: Tokenizer, token_ids: list[int], *, skip_special_tokens: bool = True) -> list[int]:
    """Return for each token how many characters the text has before it."""
    detokenizer = new_detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    offsets, length = [], 0
    for token_id in token_ids:
        offsets.append(length)
        length += len(detokenizer.push(token_id))
    return offsets


class ByteDetokenizer:
    """For byte-level tokenizers, where every token is some bytes wherever it stands."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For every other decoder: decodes the new tokens behind the last ones whose text is out, and shows the difference.

    A run of byte-fallback tokens is shown character by character. So where such a run has both whole characters and
    bytes that are no character, whole characters already shown stay, which decoding all tokens at once would replace.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._context: list[int] = []
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        if token_id in self._skipped or not self._tokenizer.knows(token_id):
            return ""
        self._pending.append(token_id)
        text = self._text()
        if self._is_incomplete(text) or len(text) <= len(self._context_text):
            return ""
        return self._show(text)

    def finish(self) -> str:
        return self._show(self._text())

    def _is_incomplete(self, text: str) -> bool:
        """Return whether the tokens to come may still make a character of the U+FFFD at the end."""
        if not text.endswith(REPLACEMENT) or len(self._pending) > MAX_CHAR_TOKENS:
            return False
        return not self._tokenizer.ends_whole(self._pending)  # which also a U+FFFD that the model writes does

    def _text(self) -> str:
        return self._decode(self._context + self._pending)

    def _show(self, text: str) -> str:
        new = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        return new

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=bool(self._skipped))

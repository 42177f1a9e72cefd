"""Compile grammars for one vocabulary, in bounded time and memory, each once for all requests that have it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from tandem.errors import InvalidRequest
from tandem.wire.grammar import Grammar

MAX_CACHED = 64
MAX_PROBLEM = 300  # characters of the library's error that a client sees
_WHITESPACE = r"\x20|\x0A[\x20\x09]{0,32}"
"""A space, or a line's end and indentation, as pretty-printers write them. A model that is kept from ending writes what
is left to it: without a bound, spaces up to its length."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a matcher must know of a model's tokens.

    Attributes:
        tokens: the bytes of each token id; none for an id that is no token. As many as the model has logits.
        special_ids: tokens that are never text.
        eos_ids: end-of-sequence tokens, allowed where a grammar can end.
        encode: text to token ids.
    """

    tokens: Sequence[bytes]
    special_ids: Set[int]
    eos_ids: Sequence[int]
    encode: Callable[[str], list[int]]


class GrammarCompiler:
    """Compiles grammars and keeps the latest ones. May be used from any thread.

    Attributes:
        encode: text to token ids, as the vocabulary's.

    Raises InvalidRequest for a model without an end-of-sequence token: no structured answer could end.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        if not vocabulary.eos_ids:
            raise InvalidRequest("this model has no end-of-sequence token, with which a structured answer must end")
        size = len(vocabulary.tokens)
        eos_ids = [token_id for token_id in vocabulary.eos_ids if token_id < size]
        self.encode = vocabulary.encode
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(vocabulary, eos_ids)), n_vocab=size, eos_token=eos_ids)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def knows(self, grammar: Grammar) -> bool:
        """Whether a matcher of this grammar takes no time to make."""
        with self._lock:
            return grammar in self._compiled

    def matcher(self, grammar: Grammar) -> LLMatcher:
        """Return a matcher at the start of the grammar. Raises InvalidRequest for a grammar that cannot be served.

        The first one takes up to some tenths of a second, which the library's limits bound.
        """
        with self._lock:
            known = self._compiled.get(grammar)
            if known is not None:
                self._compiled.move_to_end(grammar)
                return known.deep_copy()
        made = self._compile(grammar)
        with self._lock:
            self._compiled[grammar] = made
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
            return made.deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        try:
            source = _library_source(grammar)
        except Exception as error:  # the conversion from GBNF has errors of its own, and no depth of its own
            raise InvalidRequest(f"the {_NAMES[grammar.kind]} cannot be read: {str(error)[:MAX_PROBLEM]}") from None
        made = LLMatcher(self._tokenizer, source, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if not made.is_error():
            made.deep_copy().compute_bitmask()  # the lexer is built with the first mask
        if made.is_error():
            raise InvalidRequest(f"the {_NAMES[grammar.kind]} cannot be compiled: {problem(made)}")
        return made


def problem(matcher: LLMatcher) -> str:
    """Return the error of a matcher that has one, in one line."""
    return " ".join(matcher.get_error().removesuffix("<non-verbose/>").split())[:MAX_PROBLEM]


_NAMES = {"json_schema": "JSON schema", "regex": "regular expression", "lark": "grammar"}


class _Tokens:
    """A vocabulary as the library asks for it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, eos_ids: list[int]) -> None:
        self.eos_token_id = eos_ids[0]
        self.tokens = list(vocabulary.tokens)
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _library_source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.source, defaults={"whitespace_pattern": _WHITESPACE})
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "lark":
            return LLMatcher.grammar_from_lark(any_to_lark(grammar.source))

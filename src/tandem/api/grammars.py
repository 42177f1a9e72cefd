"""The grammars of requests: checked at the door, beside the event loop, each once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

from tandem.api.text_pool import TextPool
from tandem.api.tokenizer import Tokenizer, load_tokenizer
from tandem.errors import InvalidRequest, Overloaded
from tandem.grammar.compiler import GrammarCompiler, Vocabulary
from tandem.wire.grammar import MAX_GRAMMAR, Grammar

COMPILE_SECONDS = 10.0
MAX_WAITING = 64


class GrammarCheck:
    """Compiles the grammars of one model's requests, so that a broken one never reaches an engine."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pool = TextPool(MAX_WAITING)
        self._compiler: GrammarCompiler | None = None

    async def check(self, grammar: Grammar, field: str) -> None:
        """Raises InvalidRequest for a grammar that is too long, broken, or takes too long; Overloaded."""
        if len(grammar.source) > MAX_GRAMMAR:
            text = f"{field} has {len(grammar.source)} characters; at most {MAX_GRAMMAR} are taken"
            raise InvalidRequest(text, param=field)
        if self._compiler is not None and self._compiler.knows(grammar):
            return
        begun = threading.Event()
        try:
            async with asyncio.timeout(COMPILE_SECONDS):
                await self._pool.run(self._compile, grammar, begun)
        except TimeoutError:
            if not begun.is_set():
                raise Overloaded("other grammars are being compiled; try again later", retry_after=1) from None
            raise InvalidRequest(f"{field} takes more than {COMPILE_SECONDS:g} s to compile", param=field) from None
        except InvalidRequest as error:
            raise InvalidRequest(f"{field}: {error}", param=field) from None

    def _compile(self, grammar: Grammar, begun: threading.Event) -> None:
        if self._compiler is None:  # what ends a sequence the engine knows; here nothing is ended
            self._compiler = GrammarCompiler(_vocabulary(self._tokenizer, [self._tokenizer.vocab_size - 1]))
        begun.set()
        self._compiler.matcher(grammar)


def load_compiler(folder: Path, eos_ids: Sequence[int]) -> GrammarCompiler:
    """Return a compiler for the model of a folder. Raises ModelError; InvalidRequest, where no answer could end."""
    return GrammarCompiler(_vocabulary(load_tokenizer(folder), eos_ids))


def _vocabulary(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> Vocabulary:
    tokens = [tokenizer.token_bytes(token_id) for token_id in range(tokenizer.vocab_size)]

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    return Vocabulary(tokens, tokenizer.special_ids, eos_ids, encode)

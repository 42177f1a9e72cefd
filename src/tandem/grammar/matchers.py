"""The tokens that may follow a request's output: a pure function of the grammar and the output so far.

A matcher that has seen most of an output is kept, as replaying it takes time by its length; nothing else depends on
that. So a request goes on at another engine, after a preemption or beside another batch with the same masks.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher

from tandem.errors import InvalidRequest
from tandem.grammar.compiler import GrammarCompiler, problem
from tandem.wire.grammar import Grammar

MAX_KEPT = 1024


@dataclass(slots=True)
class _Kept:
    """`output`: the tokens that the matcher has consumed."""

    grammar: Grammar
    matcher: LLMatcher
    output: list[int]


class Matchers:
    """Makes masks for requests. May be used from any thread."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._lock = threading.Lock()

    def mask(self, request_id: str, grammar: Grammar, output: Sequence[int]) -> bytes:
        """Return one bit for each token of the vocabulary, lowest bit first: whether it may follow `output`.

        Raises InvalidRequest: the grammar is more than the library's limits let a mask be made of, or the output does
        not match it.
        """
        with self._lock:
            kept = self._kept.pop(request_id, None)  # for others it is not there: a matcher is one thread's at a time
        if kept is None or kept.grammar != grammar or kept.output != list(output[: len(kept.output)]):
            kept = _Kept(grammar, self._compiler.matcher(grammar), [])
        new = list(output[len(kept.output) :])
        matcher = kept.matcher
        if not matcher.consume_tokens(new):
            raise InvalidRequest(f"the answer so far does not match its grammar: {problem(matcher)}")
        kept.output += new
        mask = matcher.compute_bitmask()
        if matcher.is_error():
            raise InvalidRequest(f"the grammar is too complex: {problem(matcher)}")
        with self._lock:
            self._kept[request_id] = kept
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return mask

    def forget(self, request_id: str) -> None:
        with self._lock:
            self._kept.pop(request_id, None)

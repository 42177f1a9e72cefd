"""Grammars are checked before their requests are taken."""

from __future__ import annotations

import asyncio
import threading

import pytest

from tandem.api import grammars
from tandem.api.grammars import GrammarCheck
from tandem.api.text_pool import THREADS
from tandem.api.tokenizer import load_tokenizer
from tandem.errors import InvalidRequest, Overloaded
from tandem.wire.grammar import Grammar
from tests.support.families import DEMO_MODEL


def test_a_grammar_that_only_waited_is_not_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those before it were."""
    monkeypatch.setattr(grammars, "COMPILE_SECONDS", 0.05)
    go = threading.Event()

    async def play() -> list[BaseException | None]:
        check = GrammarCheck(load_tokenizer(DEMO_MODEL))
        await check.check(Grammar("regex", "a"), "regex")  # from here on there is a compiler
        monkeypatch.setattr(check._compiler, "matcher", lambda grammar: go.wait(20))
        found = [check.check(Grammar("regex", "b" * (number + 1)), "regex") for number in range(THREADS + 1)]
        try:
            return await asyncio.gather(*found, return_exceptions=True)
        finally:
            go.set()

    *slow, waited = asyncio.run(play())
    assert [type(error) for error in slow] == [InvalidRequest] * THREADS
    assert "takes more than" in str(slow[0])
    assert isinstance(waited, Overloaded)

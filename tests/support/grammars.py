"""Masks for tests of the step loop that have no grammars."""

from __future__ import annotations

from tandem.engine.step.masks import MaskMaker
from tandem.grammar.compiler import GrammarCompiler


def no_grammars() -> MaskMaker:
    """Return a mask maker that must not be asked for anything."""
    return MaskMaker(_load)


def _load() -> GrammarCompiler:
    raise AssertionError("this test has no grammars")

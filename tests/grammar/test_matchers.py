"""Masks are a function of grammar and output, however a matcher came to that output."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import InvalidRequest
from tandem.grammar import matchers
from tandem.grammar.compiler import GrammarCompiler
from tandem.grammar.matchers import Matchers
from tandem.wire.grammar import Grammar
from tests.grammar.conftest import EOS

PERSON = Grammar(
    "json_schema",
    json.dumps(
        {
            "type": "object",
            "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    ),
)
ANSWER = '{"name": "Ada", "age": 36}'
SPECIAL = {256, 257, 258, 259}


def allowed(mask: bytes) -> set[int]:
    return {place * 8 + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1}


def test_the_end_is_allowed_only_where_the_grammar_can_end(compiler: GrammarCompiler) -> None:
    tokens, made = compiler.encode(ANSWER), Matchers(compiler)
    masks = [allowed(made.mask("r", PERSON, tokens[:end])) for end in range(len(tokens) + 1)]
    assert all(token in mask for token, mask in zip(tokens, masks[:-1], strict=True))
    assert [EOS in mask for mask in masks] == [False] * len(tokens) + [True]
    assert masks[-1] == {EOS}
    assert not any(mask & SPECIAL for mask in masks[:-1]), "no special token is text"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, len(ANSWER))), max_size=12))
def test_a_mask_does_not_depend_on_what_was_asked_before(
    compiler: GrammarCompiler, asked: list[tuple[str, int]]
) -> None:
    tokens, made = compiler.encode(ANSWER), Matchers(compiler)
    for request_id, length in asked:
        assert made.mask(request_id, PERSON, tokens[:length]) == Matchers(compiler).mask("x", PERSON, tokens[:length])


def test_a_request_that_was_forgotten_goes_on_from_its_tokens(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matchers, "MAX_KEPT", 1)
    tokens, made = compiler.encode(ANSWER), Matchers(compiler)
    first = made.mask("a", PERSON, tokens[:9])
    made.mask("b", PERSON, [])
    assert made.mask("a", PERSON, tokens[:9]) == first
    made.forget("a")
    made.forget("a")
    assert made.mask("a", PERSON, tokens[:9]) == first


def test_an_output_that_does_not_match_is_that_requests_own_error(compiler: GrammarCompiler) -> None:
    made = Matchers(compiler)
    with pytest.raises(InvalidRequest, match="does not match its grammar"):
        made.mask("a", PERSON, compiler.encode("no"))
    assert made.mask("a", PERSON, compiler.encode("{")) == made.mask("b", PERSON, compiler.encode("{"))

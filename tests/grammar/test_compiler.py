"""Grammars that cannot be served are refused with a reason, however they are broken, and those that can are kept."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import pytest

from tandem.api.grammars import load_compiler
from tandem.errors import InvalidRequest
from tandem.grammar.compiler import MAX_CACHED, GrammarCompiler
from tandem.wire.grammar import Grammar


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(value))


def nested(depth: int) -> Any:
    return {"anyOf": [nested(depth - 1)] * 2} if depth else {"type": "string"}


BROKEN = {
    "a schema that is no JSON": Grammar("json_schema", '{"type":'),
    "a schema that is a number": schema(3),
    "a schema that nothing fits": schema(False),
    "an unknown type": schema({"type": "word"}),
    "a keyword that is not served": schema({"not": {"type": "string"}}),
    "a reference to elsewhere": schema({"$ref": "http://example.com/schema"}),
    "an unknown format": schema({"type": "string", "format": "words"}),
    "a schema that unfolds to 32768": schema(nested(15)),
    "a regular expression that does not end": Grammar("regex", "(a|b"),
    "one that looks ahead": Grammar("regex", "a(?=b)"),
    "a deep one": Grammar("regex", "(" * 5000 + "a" + ")" * 5000),
    "a grammar without its rules": Grammar("lark", "start: word"),
    "a deep grammar": Grammar("lark", "start: " + "(" * 5000 + '"a"' + ")" * 5000),
    "a deep grammar in GBNF": Grammar("lark", "root ::= " + "(" * 5000 + '"a"' + ")" * 5000),
    "GBNF that is none": Grammar("lark", "root ::= ::="),
}


@pytest.mark.parametrize("grammar", BROKEN.values(), ids=BROKEN)
def test_a_broken_grammar_is_refused_in_one_short_line(grammar: Grammar, compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.matcher(grammar)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert not compiler.knows(grammar)


LARGE = {
    "a long string": schema({"type": "string", "maxLength": 100_000}),
    "many properties": schema(
        {"properties": {f"k{i}": {"type": "string", "pattern": "^.*a.{30}$"} for i in range(999)}}
    ),
    "many choices": schema({"enum": [f"{'x' * 20}{i}" for i in range(3000)]}),
    "an expression of many states": Grammar("regex", ".*a.{200}"),
    "nested repetition": Grammar("regex", "(a{1,1000}){1,1000}"),
    "ambiguity": Grammar("lark", 'start: a\na: a a | "x" | '),
}


@pytest.mark.parametrize("grammar", LARGE.values(), ids=LARGE)
def test_a_grammar_that_blows_up_as_an_automaton_compiles_all_the_same(
    grammar: Grammar, compiler: GrammarCompiler
) -> None:
    assert not compiler.matcher(grammar).is_error()


def test_only_the_latest_grammars_are_kept(compiler: GrammarCompiler) -> None:
    grammars = [Grammar("regex", f"number {number}") for number in range(MAX_CACHED + 1)]
    for grammar in grammars:
        compiler.matcher(grammar)
    assert [compiler.knows(grammar) for grammar in grammars] == [False] + [True] * MAX_CACHED


def test_a_model_that_cannot_end_gives_no_structured_answers() -> None:
    with resources.as_file(resources.files("tandem") / "demo_model") as folder, pytest.raises(InvalidRequest):
        load_compiler(folder, [])


@pytest.mark.parametrize("text", ["root ::= [a-z]+", "start: /[a-z]+/"])
def test_grammars_may_be_written_as_gbnf_or_as_lark(text: str, compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("lark", text))
    assert matcher.consume_tokens(compiler.encode("word"))
    assert matcher.is_accepting()

"""Structured answers: from the fields that ask for one to the grammar that its text must match."""

from __future__ import annotations

import json
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import GenerateBody
from tandem.errors import InvalidRequest
from tandem.wire.grammar import Grammar

MAX_CHOICES = 1024
Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=MAX_CHOICES)]
Schema = dict[str, Any] | bool
_ANY_OBJECT: Schema = {"type": "object"}


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """OpenAI's. `strict` may say what it likes: an answer always fits the schema."""

    name: str
    schema: Schema | None = None
    description: str | None = None
    strict: bool | None = None


class AnyText(msgspec.Struct, frozen=True, tag_field="type", tag="text", forbid_unknown_fields=True):
    """No grammar."""


class AnyJson(msgspec.Struct, frozen=True, tag_field="type", tag="json_object", forbid_unknown_fields=True):
    """A JSON object."""


class JsonOfSchema(msgspec.Struct, frozen=True, tag_field="type", tag="json_schema", forbid_unknown_fields=True):
    json_schema: JsonSchema


ResponseFormat = AnyText | AnyJson | JsonOfSchema


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """vLLM's. One of the first five says what the text must be; a schema may also come as a string."""

    json: Schema | str | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    disable_any_whitespace: bool | None = None
    disable_fallback: bool | None = None


def requested_grammar(body: GenerateBody) -> tuple[Grammar, str] | None:
    """Return the grammar that a body asks for, and the field that did. Raises InvalidRequest."""
    found = [*_of_format(body), *_of_structured(body), *_of_guided(body)]
    if len(found) > 1:
        fields = ", ".join(field for _, field in found)
        raise InvalidRequest(f"an answer has one structure at most; here are {fields}", param=found[1][1])
    for grammar, field in found:
        if not grammar.source:
            raise InvalidRequest(f"{field} is empty", param=field)
        return grammar, field
    return None


async def checked_grammar(body: GenerateBody, model: LoadedModel) -> Grammar | None:
    """Return the grammar that a body asks for, once it is known to compile. Raises InvalidRequest, Overloaded."""
    asked = requested_grammar(body)
    if asked is None:
        return None
    await model.grammars.check(*asked)
    return asked[0]


def of_schema(schema: Schema | str, *, compact: bool = False) -> Grammar:
    """Return the grammar of JSON that fits a schema. `compact`: without whitespace.

    Raises ValueError for a string that is not JSON.
    """
    read: Any = json.loads(schema) if isinstance(schema, str) else schema
    if compact and isinstance(read, dict):
        read = read | {"x-guidance": {"whitespace_flexible": False}}
    return Grammar("json_schema", msgspec.json.encode(read).decode())


def of_choices(choices: list[str]) -> Grammar:
    """Return the grammar of just these texts."""
    return Grammar("lark", "start: " + " | ".join(json.dumps(one, ensure_ascii=False) for one in choices))


def _of_format(body: GenerateBody) -> list[tuple[Grammar, str]]:
    field = "response_format"
    asked = None if body.response_format is None else _converted(body.response_format, ResponseFormat, field)
    match asked:
        case AnyJson() | JsonOfSchema(json_schema=JsonSchema(schema=None)):
            return [(of_schema(_ANY_OBJECT), field)]
        case JsonOfSchema(json_schema=JsonSchema(schema=schema)) if schema is not None:
            return [(of_schema(schema), field)]
    return []


def _of_structured(body: GenerateBody) -> list[tuple[Grammar, str]]:
    if body.structured_outputs is None:
        return []
    field = "structured_outputs"
    asked = _converted(body.structured_outputs, StructuredOutputs, field)
    return _grammars(asked, f"{field}.")


def _of_guided(body: GenerateBody) -> list[tuple[Grammar, str]]:
    given = {"json": body.guided_json, "regex": body.guided_regex, "grammar": body.guided_grammar}
    asked = _converted(given | {"choice": body.guided_choice}, StructuredOutputs, "guided")
    return _grammars(asked, "guided_")


def _grammars(asked: StructuredOutputs, prefix: str) -> list[tuple[Grammar, str]]:
    compact = bool(asked.disable_any_whitespace)
    found: dict[str, Grammar] = {}
    if asked.json is not None:
        try:
            found["json"] = of_schema(asked.json, compact=compact)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{prefix}json is not JSON: {error}", param=f"{prefix}json") from None
    if asked.json_object:
        found["json_object"] = of_schema(_ANY_OBJECT, compact=compact)
    if asked.regex is not None:
        found["regex"] = Grammar("regex", asked.regex)
    if asked.choice is not None:
        found["choice"] = of_choices(asked.choice)
    if asked.grammar is not None:
        found["grammar"] = Grammar("lark", asked.grammar)
    return [(grammar, prefix + name) for name, grammar in found.items()]


def _converted(value: Any, kind: Any, field: str) -> Any:
    """Return a value as a `kind`. Raises InvalidRequest that names the place within the body."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"{field}: {error}", param=field) from None

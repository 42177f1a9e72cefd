"""Parse a request's body into a typed struct, and refuse everything that is not served, by name."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping
from functools import cache
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import NODEFAULT, Meta

from tandem.api.http_errors import UnknownField, UnsupportedField, clipped
from tandem.api.json_structure import MAX_NUMBERS, check_structure
from tandem.api.openai import ChatMessage, GenerateBody
from tandem.errors import InvalidRequest
from tandem.wire.messages import KvTransferParams
from tandem.wire.sampling import SamplingParams

Converted = TypeVar("Converted")
Parsed = TypeVar("Parsed", bound=msgspec.Struct)

# Fields of OpenAI and vLLM that are not served, each with the values that ask for nothing; null is always one of them.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    **dict.fromkeys(("audio", "moderation", "prediction", "web_search_options"), ()),
    **dict.fromkeys(("documents", "functions"), ([],)),
    "use_beam_search": (False,),
    **dict.fromkeys(("detokenize", "spaces_between_special_tokens"), (True,)),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "suffix": ("",),
    "function_call": ("none", "auto"),  # OpenAI's old way; `tools` is the new one
    # Chats have these.
    "parallel_tool_calls": (True, False),
    "reasoning_effort": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
# Fields that ask for nothing of the model, of any value: they are for the provider's books, or hints how to serve.
WITHOUT_EFFECT = (
    *("metadata", "priority", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
    *("safety_identifier", "service_tier", "store", "verbosity"),
)
# What the official client's own message objects have when an answer is sent back as part of a conversation.
NOT_SERVED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "refusal": (),
}
WHOLE_FIELDS = frozenset(
    (
        *("n", "best_of", "max_tokens", "max_completion_tokens", "min_tokens", "top_k", "seed"),
        *("logprobs", "top_logprobs", "truncate_prompt_tokens", "prompt_logprobs", "max_output_tokens"),
    )
)
MIN_LIST = 65536  # numbers: block ids of a foreign proxy are a list too
MAX_NEUTRAL = 64  # bytes of a value that asks for nothing
MAX_SHOWN = 65536  # bytes of a body of which an error shows a part
ROLES = ("system", "developer", "user", "assistant", "tool")
SAMPLING_FIELDS = frozenset(GenerateBody.__struct_fields__) & frozenset(SamplingParams.__struct_fields__)
_ABSENT = msgspec.Raw(b"null")
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)(?:\[\.\.\.\])?`$")
_FIELD = re.compile(r"Object (?:missing required|contains unknown) field `(.*?)`")
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


def parse(body: bytes | bytearray, kind: type[Parsed], max_list: int = MAX_NUMBERS) -> Parsed:
    """Return the body as a `kind`. Raises InvalidRequest, with the field at fault in `param`.

    Args:
        max_list: numbers that a list may have: as many token ids as a prompt of the model.
    """
    check_structure(body, max(max_list, MIN_LIST))
    try:
        str(body, "utf-8")  # the decoder does not look into what is only kept, or taken without an effect
        read = _decoder(kind).decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), _shown(body)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    _check_not_served(read, _not_served(kind), "")
    return kind(**{name: _served(name, getattr(read, name)) for name in kind.__struct_fields__})


def sampling_params(
    body: GenerateBody,
    max_tokens: int,
    logprobs: int | None,
    default_seed: int | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> SamplingParams:
    """Return the sampling parameters of `body`.

    Args:
        default_seed: for a body without one; None draws one.
        defaults: by field, for a body that does not say; beyond them OpenAI's.

    Raises InvalidRequest for a value out of range.
    """
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    wanted = default_seed if body.seed is None else body.seed
    seed = secrets.randbits(63) if wanted is None else wanted % 2**63
    fixed = {"max_tokens": max_tokens, "logprobs": logprobs, "seed": seed}
    return convert({**(defaults or {}), **given, **fixed}, SamplingParams)


def kv_transfer_params(fields: dict[str, Any]) -> KvTransferParams:
    """Return what a foreign proxy passes between its engines; keys that are not ours are its own affair."""
    given = {name: value for name, value in fields.items() if value is not None}
    try:
        return msgspec.convert(given, KvTransferParams)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"kv_transfer_params: {error}", param="kv_transfer_params") from None


def message_text(message: ChatMessage, place: int) -> str:
    """Return the text of a message; parts of type `text` are joined with newlines."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(_part_text(part, f"messages[{place}].content[{i}]") for i, part in enumerate(message.content))


def convert(value: Any, kind: type[Converted]) -> Converted:
    """Return `value` as a `kind`. Raises InvalidRequest that names the field, what was expected and what came."""
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except msgspec.ValidationError as error:
        raise _invalid(str(error), value) from None


def _invalid(problem: str, value: Any) -> InvalidRequest:
    found = _PLACE.search(problem)
    place = found[1] if found else ""
    expected = problem[: found.start()] if found else problem
    if field := _FIELD.search(expected):
        unknown = "unknown" in expected
        name = clipped(field[1])
        if unknown and not place:
            return UnknownField(f"unknown field `{name}`; leave it out", param=name)
        place = f"{place}.{name}" if place else name
        return InvalidRequest(f"{place}: this field is {'unknown' if unknown else 'missing'}", param=place)
    came = "" if "got" in expected else _at(value, place)
    return InvalidRequest(f"{place or 'the body'}: {expected}{came}", param=place or None)


def _shown(body: bytes | bytearray) -> Any:
    """Return the body's value for an error to show a part of it; None for a long one."""
    if len(body) > MAX_SHOWN:
        return None
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):  # a number out of range somewhere, or bytes that are no text
        return None


def _check_not_served(read: Any, table: dict[str, tuple[Any, ...]], place: str) -> None:
    """Raise UnsupportedField for a field that is not served and asks for something."""
    for name, neutral in table.items():
        raw = getattr(read, name)
        if raw is not _ABSENT and not _asks_for_nothing(bytes(raw), neutral):
            raise UnsupportedField(f"`{place}{name}` is not supported here; leave it out", param=place + name)


def _asks_for_nothing(raw: bytes, neutral: tuple[Any, ...]) -> bool:
    if len(raw) > MAX_NEUTRAL:
        return False
    value = msgspec.json.decode(raw)
    return value is None or any(type(value) is type(one) and value == one for one in neutral)


def _served(name: str, value: Any) -> Any:
    if name == "messages" and value is not None and not isinstance(value[0], dict):
        return [_served_message(one, place) for place, one in enumerate(value)]
    if name in WHOLE_FIELDS and isinstance(value, float):
        if not value.is_integer():
            raise InvalidRequest(f"{name}: Expected `int`, got {value!r}", param=name)
        return int(value)
    return value


def _served_message(read: Any, place: int) -> ChatMessage:
    if read.role not in ROLES:
        raise InvalidRequest(
            f"messages[{place}]: role must be one of {', '.join(ROLES)}; it is {clipped(read.role)!r}",
            param="messages",
        )
    _check_not_served(read, NOT_SERVED_IN_MESSAGES, f"messages[{place}].")
    if read.content is None and read.role != "assistant":
        raise InvalidRequest(
            f"messages[{place}].content: this field is missing or null, which only an assistant's may be",
            param=f"messages[{place}].content",
        )
    content = "" if read.content is None else read.content
    return ChatMessage(read.role, content, read.name, read.tool_calls, read.tool_call_id, read.reasoning_content)


@cache
def _decoder(kind: type[msgspec.Struct]) -> msgspec.json.Decoder[Any]:
    """Return a decoder that takes what clients may write for a `kind`, and refuses the rest as soon as it comes to it.

    Fields that are not served are left as they are written; whole numbers may be written as floats, as 16.0.
    """
    hints = get_type_hints(kind, include_extras=True)
    fields: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(kind):
        hint = hints[field.name]
        if field.name == "messages" and ChatMessage in _inside(hint):
            messages: Any = Annotated[list[_message_type()], Meta(min_length=1)]  # type: ignore[misc]
            hint = messages if field.required else messages | None
        elif field.name in WHOLE_FIELDS:
            hint = _or_float(hint)
        fields.append((field.name, hint, field.default))
    without_effect = [name for name in WITHOUT_EFFECT if name not in kind.__struct_fields__]
    return msgspec.json.Decoder(_struct(kind.__name__, fields, [*_not_served(kind), *without_effect]))


@cache
def _not_served(kind: type[msgspec.Struct]) -> dict[str, tuple[Any, ...]]:
    """Return the fields that are not served in a `kind`; it may have a table of its own, `NOT_SERVED`."""
    table = {**NOT_SERVED, **getattr(kind, "NOT_SERVED", {})}
    return {name: neutral for name, neutral in table.items() if name not in kind.__struct_fields__}


def _inside(hint: Any) -> set[Any]:
    """Return a type and those that it is made of."""
    return {hint}.union(*(_inside(one) for one in get_args(hint)))


def _message_type() -> type[msgspec.Struct]:
    hints = get_type_hints(ChatMessage, include_extras=True)
    optional = [(name, hints[name], None) for name in ("name", "tool_calls", "tool_call_id", "reasoning_content")]
    fields = [("role", str, NODEFAULT), ("content", hints["content"] | None, None), *optional]
    return _struct("Message", fields, NOT_SERVED_IN_MESSAGES)


def _struct(name: str, fields: list[tuple[str, Any, Any]], not_served: Iterable[str]) -> type[msgspec.Struct]:
    left = [(one, msgspec.Raw, _ABSENT) for one in not_served]
    return msgspec.defstruct(name, [*fields, *left], kw_only=True, forbid_unknown_fields=True)


def _or_float(hint: Any) -> Any:
    """Return the type of a whole number, with its range, that may be written as a float too."""
    number = hint if get_origin(hint) is Annotated else next(one for one in get_args(hint) if one is not NoneType)
    if get_origin(number) is not Annotated:
        return hint | float
    return hint | Annotated[(float, *number.__metadata__)]


def _part_text(part: dict[str, Any], place: str) -> str:
    if part.get("type") != "text":
        raise UnsupportedField(
            f"{place}: parts of type {clipped(str(part.get('type')))!r} are not supported, only 'text'",
            param="messages",
        )
    text = part.get("text")
    if not isinstance(text, str) or part.keys() - {"type", "text"}:
        raise InvalidRequest(
            f"{place}: a text part has `type` and `text`, a string, and nothing else", param="messages"
        )
    return text


def _at(value: Any, place: str) -> str:
    """Return `, got ...` for the value that is at `place`, such as `messages[0].role`."""
    for index, name in _STEP.findall(place):
        try:
            value = value[int(index)] if index else value[name]
        except (KeyError, IndexError, TypeError):
            return ""
    shown = repr(value)
    return f", got {shown}" if place and len(shown) <= 80 else ""

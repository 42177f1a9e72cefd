"""Parse a request's body into a typed struct, and refuse everything that is not served, by name."""

from __future__ import annotations

import re
import secrets
from typing import Any, TypeVar

import msgspec

from tandem.api.http_errors import UnknownField, UnsupportedField
from tandem.api.openai import Body, ChatMessage, GenerateBody
from tandem.errors import InvalidRequest
from tandem.wire.messages import KvTransferParams
from tandem.wire.sampling import SamplingParams

Converted = TypeVar("Converted")

# Fields of OpenAI and vLLM that are not served, each with the values that ask for nothing; null is always one of them.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("allowed_token_ids", "chat_template", "prompt_logprobs", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("guided_choice", "guided_grammar", "guided_json", "guided_regex", "structured_outputs"), ()),
    **dict.fromkeys(("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"), ()),
    **dict.fromkeys(("audio", "moderation", "prediction", "reasoning_effort", "verbosity", "web_search_options"), ()),
    "safety_identifier": (),
    **dict.fromkeys(("bad_words", "documents", "functions", "tools"), ([],)),
    **dict.fromkeys(("continue_final_message", "include_stop_str_in_output", "store", "use_beam_search"), (False,)),
    **dict.fromkeys(("add_generation_prompt", "detokenize", "skip_special_tokens"), (True,)),
    "spaces_between_special_tokens": (True,),
    "length_penalty": (1, 1.0),
    "metadata": ({},),
    "modalities": (["text"],),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    # Tools are not served, so the fields that only steer them may say anything that does not ask for a call.
    **dict.fromkeys(("function_call", "tool_choice"), ("none", "auto")),
    "parallel_tool_calls": (True, False),
}
# What the official client's own message objects have when an answer is sent back as part of a conversation.
NOT_SERVED_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
}
ROLES = ("system", "developer", "user", "assistant")
SAMPLING_FIELDS = frozenset(GenerateBody.__struct_fields__) & frozenset(SamplingParams.__struct_fields__)
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?(.*?)(?:\[\.\.\.\])?`$")
_FIELD = re.compile(r"Object (?:missing required|contains unknown) field `(.*?)`")
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


def parse(body: bytes, kind: type[Body]) -> Body:
    """Return the body as a `kind`. Raises InvalidRequest, with the field at fault in `param`."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise InvalidRequest(f"the body must be a JSON object; it is a {type(fields).__name__}")
    fields = _without_not_served(fields, NOT_SERVED, "")
    if "messages" in kind.__struct_fields__:
        fields = _with_messages(fields)
    if unknown := fields.keys() - set(kind.__struct_fields__):
        name = min(unknown)
        raise UnknownField(f"unknown field `{name}`; leave it out", param=name)
    return convert(fields, kind)


def sampling_params(
    body: GenerateBody, max_tokens: int, logprobs: int | None, default_seed: int | None = None
) -> SamplingParams:
    """Return the sampling parameters of `body`. Defaults are OpenAI's, not those of the model's generation_config.json.

    Without any seed a random one is taken. Raises InvalidRequest for a value out of range.
    """
    given = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name)) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    wanted = default_seed if body.seed is None else body.seed
    seed = secrets.randbits(63) if wanted is None else wanted % 2**63
    return convert(given | {"max_tokens": max_tokens, "logprobs": logprobs, "seed": seed}, SamplingParams)


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
        place = f"{place}.{field[1]}" if place else field[1]
        return InvalidRequest(
            f"{place}: this field is {'missing' if 'missing' in expected else 'unknown'}", param=place
        )
    came = "" if "got" in expected else _at(value, place)
    return InvalidRequest(f"{place or 'the body'}: {expected}{came}", param=place or None)


def _without_not_served(fields: dict[str, Any], table: dict[str, tuple[Any, ...]], place: str) -> dict[str, Any]:
    """Return `fields` without those that are not served, if they ask for nothing."""
    for name in fields.keys() & table.keys():
        value = fields[name]
        if value is not None and not any(type(value) is type(one) and value == one for one in table[name]):
            raise UnsupportedField(f"`{place}{name}` is not supported here; leave it out", param=place + name)
    return {name: value for name, value in fields.items() if name not in table}


def _with_messages(fields: dict[str, Any]) -> dict[str, Any]:
    messages = fields.get("messages")
    if not isinstance(messages, list):
        return fields
    return fields | {"messages": [_served_message(one, i) for i, one in enumerate(messages)]}


def _served_message(message: Any, place: int) -> Any:
    if not isinstance(message, dict):
        return message
    role = message.get("role")
    if role in ("tool", "function"):
        raise UnsupportedField(
            f"messages[{place}]: role `{role}` is not supported: there are no tools", param="messages"
        )
    if isinstance(role, str) and role not in ROLES:
        raise InvalidRequest(
            f"messages[{place}]: role must be one of {', '.join(ROLES)}; it is {role!r}", param="messages"
        )
    return _without_not_served(message, NOT_SERVED_IN_MESSAGES, f"messages[{place}].")


def _part_text(part: dict[str, Any], place: str) -> str:
    if part.get("type") != "text":
        raise UnsupportedField(
            f"{place}: parts of type {part.get('type')!r} are not supported, only 'text'", param="messages"
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

"""Render chat messages to one prompt by the model's own Jinja template."""

from __future__ import annotations

import enum
import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.api.http_errors import UnsupportedField
from tandem.api.tokenizer import read_json
from tandem.errors import InvalidRequest

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", *SPECIAL_TOKENS})
_OPEN_END = "TANDEM-GOES-ON-HERE "  # with a space at its end, which shows whether the template strips messages


class PromptEnd(enum.Enum):
    """Where the model goes on."""

    NEW_MESSAGE = "in a new message of the assistant"
    AFTER_LAST_MESSAGE = "after the last message"
    IN_LAST_MESSAGE = "in the last message"


class ChatTemplate:
    """A compiled template with the model's special tokens.

    Args:
        source: Jinja, as in `chat_template`; None if the model has none.
    """

    def __init__(self, source: str | None, special_tokens: dict[str, str], missing: str = "") -> None:
        self.source = source
        self._special_tokens = special_tokens
        self._missing = missing
        self._template: jinja2.Template | None = None
        self._knows_developer = source is not None and "developer" in source
        if source is not None:
            try:
                self._template = _environment().from_string(source)
            except jinja2.TemplateError as error:
                self._missing = f"the model's chat template is broken: {error}"

    def render(
        self,
        messages: list[dict[str, Any]],
        variables: dict[str, Any],
        end: PromptEnd = PromptEnd.NEW_MESSAGE,
        tools: list[dict[str, Any]] | None = None,
    ) -> str:
        """Return the prompt, up to where the model goes on. Raises InvalidRequest.

        Where a template does not know OpenAI's role `developer`, its messages are given as `system`.
        """
        if self._template is None:
            raise UnsupportedField(f"{self._missing}; use /v1/completions", param="messages")
        if taken := RESERVED & variables.keys():
            raise InvalidRequest(f"chat_template_kwargs must not set {min(taken)}", param="chat_template_kwargs")
        if not self._knows_developer:
            messages = [one | {"role": "system"} if one["role"] == "developer" else one for one in messages]
        if end is PromptEnd.IN_LAST_MESSAGE:
            last = messages[-1]
            messages = [*messages[:-1], last | {"content": last["content"] + _OPEN_END}]
        begins = end is PromptEnd.NEW_MESSAGE
        values = {"messages": messages, "tools": tools, "documents": None, "add_generation_prompt": begins}
        try:
            text = self._template.render(**values, **self._special_tokens, **variables)
        except Exception as error:  # whatever a model's template runs into with these messages
            raise InvalidRequest(f"the model's chat template refuses the messages: {error}", param="messages") from None
        return _cut(text) if end is PromptEnd.IN_LAST_MESSAGE else text


def _cut(text: str) -> str:
    """Return the prompt up to where the last message ends; without the space around it, if the template strips it."""
    place = text.rfind(_OPEN_END.strip())
    if place < 0:
        raise InvalidRequest(
            "the model's chat template does not show the last message as it is, so it cannot go on with it",
            param="continue_final_message",
        )
    return text[:place] if text.startswith(_OPEN_END, place) else text[:place].rstrip()


def load_template(folder: Path) -> ChatTemplate:
    """Load chat_template.jinja, else chat_template.json, else tokenizer_config.json. Raises ModelError."""
    config = read_json(folder / "tokenizer_config.json")
    specials = _special_tokens(read_json(folder / "special_tokens_map.json") | config)
    file = folder / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), specials)
    found = read_json(folder / "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        names = ", ".join(sorted(str(name) for name in named))
        return ChatTemplate(
            named.get("default"), specials, f"of the model's chat templates ({names}) none is 'default'"
        )
    return ChatTemplate(found if isinstance(found, str) else None, specials, "the model has no chat template")


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the special tokens by name. A token is a string, or an object with its `content`."""
    found = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            found[name] = content
    return found


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that templates of Hugging Face models are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; here it is only its contents."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as it is; Jinja's own filter escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)

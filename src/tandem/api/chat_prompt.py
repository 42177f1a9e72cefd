"""The prompt that the model's chat template makes of a body's messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from tandem.api.chat_template import PromptEnd
from tandem.api.http_errors import UnsupportedField
from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import ChatMessage
from tandem.api.parsing import message_text
from tandem.api.prompt_encoder import INLINE_CHARS, INLINE_TEXTS
from tandem.api.tools import told_calls
from tandem.errors import InvalidRequest


class Chat(Protocol):
    """A body with messages."""

    @property
    def messages(self) -> Sequence[ChatMessage] | None: ...
    @property
    def add_generation_prompt(self) -> bool | None: ...
    @property
    def continue_final_message(self) -> bool | None: ...
    @property
    def reasoning_effort(self) -> str | None: ...
    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None: ...


async def render_chat(body: Chat, model: LoadedModel, tools: list[dict[str, Any]] | None = None) -> str:
    """Return the prompt as text. Raises InvalidRequest, Overloaded.

    Args:
        tools: of which the model is told.
    """
    messages: list[dict[str, Any]] = []
    for index, message in enumerate(body.messages or ()):
        one = {"role": message.role, "content": message_text(message, index), **told_calls(message, index)}
        messages.append(one if message.name is None else one | {"name": message.name})
    variables = effort_variables(body, model) | (body.chat_template_kwargs or {})
    end = _end(body)
    chars = sum(len(one["content"]) for one in messages) + (len(msgspec.json.encode(tools)) if tools else 0)
    model.encoder.check_length(chars, "messages")
    beside = sum(_chars_beside_content(message) for message in body.messages or ())
    if chars + beside <= INLINE_CHARS and len(messages) <= INLINE_TEXTS and not variables:
        return model.template.render(messages, variables, end, tools)
    return await model.pool.run(model.template.render, messages, variables, end, tools)


def _chars_beside_content(message: ChatMessage) -> int:
    """Return how much a template may write beside the text; many leave it out, so it is no part of the length yet."""
    arguments = sum(len(one.function.arguments) for one in message.tool_calls or ())
    return len(message.reasoning_content or "") + arguments


def effort_variables(body: Chat, model: LoadedModel) -> dict[str, Any]:
    """Return what tells the template of `reasoning_effort`. Raises UnsupportedField where it knows no such thing."""
    if body.reasoning_effort is None:
        return {}
    source = model.template.source or ""
    if "reasoning_effort" in source:
        return {"reasoning_effort": body.reasoning_effort}
    if "enable_thinking" in source:
        return {"enable_thinking": body.reasoning_effort != "none"}
    raise UnsupportedField("this model's chat template knows no effort; leave it out", param="reasoning_effort")


def _end(body: Chat) -> PromptEnd:
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise InvalidRequest(
                "continue_final_message goes on with the last message, and add_generation_prompt begins a new one;"
                " set only one of them",
                param="continue_final_message",
            )
        return PromptEnd.IN_LAST_MESSAGE
    return PromptEnd.AFTER_LAST_MESSAGE if body.add_generation_prompt is False else PromptEnd.NEW_MESSAGE

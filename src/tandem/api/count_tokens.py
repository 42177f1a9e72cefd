"""Anthropic's /v1/messages/count_tokens: how many tokens a conversation would have, without an engine."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.api.chat import encode_chat
from tandem.api.messages_api import Conversation, conversation
from tandem.api.request_frame import FramedEndpoint, OpenRequest, check_model
from tandem.api.translated import NAMED


@dataclass(frozen=True)
class CountTokensEndpoint(FramedEndpoint):
    errors = NAMED

    async def respond(self, request: OpenRequest) -> None:
        model, body = await self.read(request, Conversation)
        chat = conversation(body)
        check_model(chat.model, model.card)
        self.check_messages(chat.messages)
        prompt = await encode_chat(chat, model)
        await request.writer.whole({"input_tokens": len(prompt.token_ids)})

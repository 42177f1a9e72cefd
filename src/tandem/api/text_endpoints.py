"""/tokenize and /detokenize, as vLLM has them: text to token ids and back, without an engine."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.api.chat_prompt import render_chat
from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import DetokenizeBody, DetokenizeResponse, TokenizeBody, TokenizeResponse
from tandem.api.request_frame import FramedEndpoint, OpenRequest, check_model
from tandem.errors import InvalidRequest


@dataclass(frozen=True)
class TokenizeEndpoint(FramedEndpoint):
    """Tokenizes a prompt with the model's special tokens, or messages as a chat makes its prompt of them."""

    async def respond(self, request: OpenRequest) -> None:
        model, body = await self.read(request, TokenizeBody)
        check_model(body.model, model.card)
        self.check_messages(body.messages)
        tokens = await _tokenize(body, model)
        pieces = await model.pool.run(model.tokenizer.pieces, tokens) if body.return_token_strs else None
        await request.writer.whole(TokenizeResponse(len(tokens), model.card.max_model_len, tokens, pieces))


@dataclass(frozen=True)
class DetokenizeEndpoint(FramedEndpoint):
    """Turns token ids into text, special tokens too."""

    async def respond(self, request: OpenRequest) -> None:
        model, body = await self.read(request, DetokenizeBody)
        check_model(body.model, model.card)
        model.check_token_ids(body.tokens, "tokens")
        text = await model.pool.run(model.tokenizer.decode, body.tokens, skip_special_tokens=False)
        await request.writer.whole(DetokenizeResponse(text))


async def _tokenize(body: TokenizeBody, model: LoadedModel) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("either prompt or messages must be given, and not both", param="prompt")
    if body.prompt is not None:
        text, field, specials = body.prompt, "prompt", body.add_special_tokens is not False
    else:
        text, field, specials = await render_chat(body, model), "messages", bool(body.add_special_tokens)
    [tokens] = await model.encoder.encode([text], field, add_special_tokens=specials)
    return tokens

"""/v1/completions: prompts as text or token ids, and the completion response objects."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from tandem.api.detokenizer import text_offsets
from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import CompletionBody, CompletionChoice, CompletionLogprobs
from tandem.api.output_processor import TextChunk
from tandem.api.parsing import sampling_params
from tandem.api.prepared_request import PreparedRequest, Prompt, prepare_request
from tandem.api.response_builder import ResponseBuilder, finite, with_chosen
from tandem.api.structured import checked_grammar
from tandem.errors import InvalidRequest
from tandem.wire.messages import TokenLogprobs
from tandem.wire.sampling import SamplingParams

DEFAULT_MAX_TOKENS = 16


def count_completions(body: CompletionBody) -> int:
    """Return the number of choices that are asked for."""
    return len(prompt_list(body.prompt)) * (body.n or 1)


async def prepare_completion(request_id: str, body: CompletionBody, model: LoadedModel) -> PreparedRequest:
    """Raises InvalidRequest."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest("best_of is not supported, unless it equals n", param="best_of")
    grammar = await checked_grammar(body, model)
    prompts = await _encoded(body, model)
    sampled = [(prompt, _sampling(body, prompt, model)) for prompt in prompts]
    return await prepare_request(request_id, body, model, sampled, grammar)


class CompletionBuilder(ResponseBuilder[CompletionBody]):
    ID_PREFIX = "cmpl-"
    OBJECT = CHUNK_OBJECT = "text_completion"

    def __init__(self, request: PreparedRequest, body: CompletionBody) -> None:
        super().__init__(request, body)
        self._prompt_texts: dict[int, str] = {}

    def choice(self, chunk: TextChunk, first: bool) -> CompletionChoice:
        prompt = self.request.sequences[chunk.index].prompt
        echoes = first and bool(self.body.echo)
        wants_scores = first and self.body.prompt_logprobs is not None
        return CompletionChoice(
            **self.choice_fields(chunk),
            text=self._prompt_text(chunk.index) + chunk.text if echoes else chunk.text,
            logprobs=self._logprobs(chunk, prompt, echoes) if self.body.logprobs is not None else None,
            prompt_token_ids=prompt.token_ids if first and self.body.return_token_ids else UNSET,
            prompt_logprobs=self.ranked(prompt, chunk, self.body.prompt_logprobs or 0) if wants_scores else UNSET,
        )

    chunk_choice = choice

    def _prompt_text(self, index: int) -> str:
        """Return the text of a choice's prompt; token ids are decoded once, as every chunk's offsets count from it."""
        known = self._prompt_texts.get(index)
        if known is None:
            prompt = self.request.sequences[index].prompt
            known = prompt.text
            if known is None:
                known = self.request.model.tokenizer.decode(prompt.token_ids, skip_special_tokens=self._skips(prompt))
            self._prompt_texts[index] = known
        return known

    def _skips(self, prompt: Prompt) -> bool:
        """Whether special tokens are no text of this prompt. A text stands as written: what was added is not in it."""
        return prompt.text is not None or self.body.skip_special_tokens is not False

    def _logprobs(self, chunk: TextChunk, prompt: Prompt, echoes: bool) -> CompletionLogprobs:
        """Return the chunk's, after the prompt's own if that is echoed in it."""
        shift = len(self._prompt_text(chunk.index)) if self.body.echo else 0
        told: list[tuple[int, int, TokenLogprobs | None]] = []
        if echoes:
            skips = self._skips(prompt)
            offsets = text_offsets(self.request.model.tokenizer, prompt.token_ids, skip_special_tokens=skips)
            told += zip(prompt.token_ids, offsets, [None, *(chunk.prompt_logprobs or [])], strict=True)
        told += [(token.id, token.offset + shift, token.logprobs) for token in chunk.tokens if token.logprobs]
        text = self.request.model.tokenizer.token_text
        most = self.body.logprobs or 0
        return CompletionLogprobs(
            tokens=[text(token) for token, _, _ in told],
            token_logprobs=[None if one is None else finite(one.logprob) for _, _, one in told],
            top_logprobs=[
                None if one is None else {text(i): finite(value) for i, value in with_chosen(token, one, most)}
                for token, _, one in told
            ],
            text_offset=[offset for _, offset, _ in told],
        )


def _sampling(body: CompletionBody, prompt: Prompt, model: LoadedModel) -> SamplingParams:
    limit = model.output_limit(len(prompt.token_ids), body.max_tokens, DEFAULT_MAX_TOKENS, "prompt")
    found = sampling_params(body, limit, body.logprobs, model.card.seed, model.defaults.sampling)
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        return msgspec.structs.replace(found, prompt_logprobs=body.logprobs)
    return found


def prompt_list(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """Return the prompts, which OpenAI's API can write in four ways, as a list."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [one for one in prompt if isinstance(one, int)]
    if not prompt:
        raise InvalidRequest("prompt is empty", param="prompt")
    if len(ids) == len(prompt):
        return [ids]
    found = [one for one in prompt if not isinstance(one, int)]
    if len({type(one) for one in prompt}) > 1:
        raise InvalidRequest("prompt must be a string, token ids, or a list of only one of these", param="prompt")
    return found


async def _encoded(body: CompletionBody, model: LoadedModel) -> list[Prompt]:
    prompts = prompt_list(body.prompt)
    if not all(prompts):
        raise InvalidRequest("prompt is empty", param="prompt")
    texts = [one for one in prompts if isinstance(one, str)]
    keep = model.prompt_limit(body.truncate_prompt_tokens, body.max_tokens)
    specials = body.add_special_tokens is not False
    encoded = await model.encoder.encode(texts, "prompt", add_special_tokens=specials, keep=keep)
    found = [Prompt(token_ids, None if keep else text) for token_ids, text in zip(encoded, texts, strict=True)]
    for one in prompts:
        if isinstance(one, list):
            model.check_token_ids(one, "prompt")
            found.append(Prompt(one if keep is None else one[max(0, len(one) - keep) :]))
    if not all(prompt.token_ids for prompt in found):
        raise InvalidRequest("prompt has no tokens", param="prompt")
    return found

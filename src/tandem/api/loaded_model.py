"""The model behind the API: its card, tokenizer and chat template, loaded when the backend first knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from tandem.api.backend import Backend, ModelCard
from tandem.api.chat_template import ChatTemplate, load_template
from tandem.api.generation_defaults import OPENAIS, GenerationDefaults, load_defaults
from tandem.api.grammars import GrammarCheck
from tandem.api.http_errors import ContextTooLong
from tandem.api.prompt_encoder import PromptEncoder
from tandem.api.reasoning import reasons
from tandem.api.text_pool import TextPool
from tandem.api.tokenizer import Tokenizer, load_tokenizer
from tandem.api.tool_syntaxes import ToolSyntax, syntax_of
from tandem.config import GenerationSource, ReasoningParser, ToolCallParser
from tandem.errors import InvalidRequest, ModelError, RequestError


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model's text side.

    Attributes:
        encoder: tokenizes, in bounded work.
        pool: for other work on text.
        defaults: of requests that say nothing.
        grammars: checks those of structured answers.
        tool_syntax: how it writes tool calls; None where that is not known.
        reasons: its answers may begin with reasoning.
    """

    card: ModelCard
    tokenizer: Tokenizer
    template: ChatTemplate
    encoder: PromptEncoder
    pool: TextPool
    defaults: GenerationDefaults
    grammars: GrammarCheck
    tool_syntax: ToolSyntax | None
    reasons: bool

    def output_limit(self, prompt_len: int, asked: int | None, default: int | None, field: str) -> int:
        """Return the number of tokens that may follow the prompt.

        Args:
            asked: by the client; it must fit. 0 is 1 here.
            default: for a client that does not say, or less where less fits; None for all that fits.
            field: of the body, where the prompt is.
        """
        asked = 1 if asked == 0 else asked  # engines make one token at least
        room = self.card.max_model_len - prompt_len
        if room < 1 or (asked is not None and asked > room):
            output = f"max_tokens is {asked}" if asked is not None else "max_tokens is not set"
            raise ContextTooLong(
                f"the prompt has {prompt_len} tokens and {output}; prompt and output together may have at most "
                f"{self.card.max_model_len} tokens (one of them output at least)",
                param=field if room < 1 else "max_tokens",
            )
        if asked is not None:
            return asked
        return room if default is None else min(default, room)

    def prompt_limit(self, asked: int | None, max_tokens: int | None) -> int | None:
        """Return how many of a prompt's last tokens are kept; None for all.

        Args:
            asked: truncate_prompt_tokens; -1 for what leaves room for the output.
        """
        longest = self.card.max_model_len
        if asked is not None and asked > longest:
            raise InvalidRequest(
                f"truncate_prompt_tokens is {asked}, and this model takes {longest} tokens",
                param="truncate_prompt_tokens",
            )
        return max(1, longest - (max_tokens or 1)) if asked == -1 else asked

    def check_token_ids(self, token_ids: list[int], param: str) -> None:
        """Raise InvalidRequest for one that the vocabulary does not have."""
        size = self.tokenizer.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < size):
            wrong = next(one for one in token_ids if not 0 <= one < size)
            raise InvalidRequest(f"{param}: {wrong} is not a token id; they go from 0 to {size - 1}", param=param)


class ModelLoader:
    """Loads once, off the event loop, and again if the backend's model changes.

    Args:
        source: of the defaults of requests; "tandem" for OpenAI's.
        tool_calls: how the model writes them; "auto" as its chat template shows.
        reasoning: whether its answers begin with some.
    """

    def __init__(
        self,
        backend: Backend,
        source: GenerationSource = "auto",
        tool_calls: ToolCallParser = "auto",
        reasoning: ReasoningParser = "auto",
    ) -> None:
        self._backend = backend
        self._source = source
        self._tool_calls = tool_calls
        self._reasoning = reasoning
        self._lock = asyncio.Lock()
        self._pool = TextPool()
        self._loaded: LoadedModel | None = None

    async def get(self) -> LoadedModel:
        """Return the model, loaded.

        Raises Unavailable while the backend knows no model; RequestError (500) if its folder cannot be used.
        """
        card = await self._backend.model()
        async with self._lock:
            if self._loaded is None or self._loaded.card != card:
                self._loaded = await self._load(card)
            return self._loaded

    async def _load(self, card: ModelCard) -> LoadedModel:
        if self._loaded is not None and self._loaded.card.path == card.path:
            known = self._loaded
            return self._model(card, known.tokenizer, known.template, known.defaults, known.grammars)
        folder = Path(card.path)
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, folder)
            template = await asyncio.to_thread(load_template, folder)
            defaults = OPENAIS if self._source == "tandem" else await asyncio.to_thread(load_defaults, folder)
        except (ModelError, OSError, ValueError) as error:  # the path is what an engine says
            raise RequestError(f"the model's text files cannot be used: {error}") from error
        return self._model(card, tokenizer, template, defaults, GrammarCheck(tokenizer))

    def _model(
        self,
        card: ModelCard,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        defaults: GenerationDefaults,
        grammars: GrammarCheck,
    ) -> LoadedModel:
        encoder = PromptEncoder(tokenizer, self._pool, card.max_model_len)
        syntax = syntax_of(self._tool_calls, template.source)
        thinks = reasons(self._reasoning, template.source)
        return LoadedModel(card, tokenizer, template, encoder, self._pool, defaults, grammars, syntax, thinks)

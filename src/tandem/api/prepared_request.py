"""A client's request made ready: prompts as token ids, and one sequence for each choice."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import msgspec

from tandem.api.backend import TokenRequest
from tandem.api.bad_words import banned_runs
from tandem.api.detokenizer import new_detokenizer
from tandem.api.loaded_model import LoadedModel
from tandem.api.openai import GenerateBody
from tandem.api.output_processor import OutputProcessor
from tandem.api.parsing import kv_transfer_params
from tandem.api.stop_strings import StopPatterns
from tandem.errors import InvalidRequest
from tandem.wire.grammar import Grammar
from tandem.wire.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Prompt:
    """`text`: as the client wrote it, or None where it sent token ids."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True, slots=True)
class PreparedSequence:
    """One choice. `first_of_prompt`: of the n choices for one prompt, the one that counts it in the usage."""

    request: TokenRequest
    prompt: Prompt
    first_of_prompt: bool
    output: OutputProcessor


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request, ready for the backend.

    Attributes:
        wants_tokens: whether the client wants to see every token (ids or logprobs), also where no text comes of it yet.
    """

    request_id: str
    model: LoadedModel
    sequences: list[PreparedSequence]
    wants_tokens: bool
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def prompt_tokens(self) -> int:
        return sum(len(one.prompt.token_ids) for one in self.sequences if one.first_of_prompt)

    @property
    def output_tokens(self) -> int:
        return sum(one.output.token_count for one in self.sequences)


async def prepare_request(
    request_id: str,
    body: GenerateBody,
    model: LoadedModel,
    prompts: list[tuple[Prompt, SamplingParams]],
    grammar: Grammar | None = None,
) -> PreparedRequest:
    """Return the request for these prompts, each with its sampling parameters. Raises InvalidRequest.

    Args:
        grammar: what each of the answers must match.
    """
    copies = body.n or 1
    count = len(prompts) * copies
    _check(body, model, prompts[0][1], count)
    banned = await banned_runs(body.bad_words, model)
    kv = kv_transfer_params(body.kv_transfer_params) if body.kv_transfer_params is not None else None
    stop_list = [body.stop] if isinstance(body.stop, str) else body.stop
    stops = StopPatterns(stop_list) if stop_list else None
    silent = asks_for_none(body)
    skips, keeps = body.skip_special_tokens is not False, bool(body.include_stop_str_in_output)
    sequences: list[PreparedSequence] = []
    for prompt, sampling in prompts:
        for copy in range(copies):
            index = len(sequences)
            own_id = f"{request_id}-{index}" if count > 1 else request_id
            seed = (sampling.seed + copy) % 2**63  # each choice has its own
            own = msgspec.structs.replace(sampling, seed=seed, banned_runs=banned)
            request = TokenRequest(own_id, prompt.token_ids, own, kv, body.cache_salt, grammar)
            detokenizer = new_detokenizer(model.tokenizer, skip_special_tokens=skips)
            output = OutputProcessor(detokenizer, index, stops, own, keeps, silent)
            sequences.append(PreparedSequence(request, prompt, copy == 0, output))
    first = prompts[0][1]
    wants_tokens = bool(body.return_token_ids) or first.logprobs is not None or first.prompt_logprobs is not None
    return PreparedRequest(request_id, model, sequences, wants_tokens)


def asks_for_none(body: GenerateBody) -> bool:
    """Return whether the prompt alone is wanted: a length of 0. Engines make one token, which is not shown."""
    return body.max_tokens == 0 or getattr(body, "max_completion_tokens", None) == 0


def _check(body: GenerateBody, model: LoadedModel, sampling: SamplingParams, count: int) -> None:
    model.check_token_ids(sampling.stop_token_ids, "stop_token_ids")
    model.check_token_ids(list(sampling.logit_bias), "logit_bias")
    model.check_token_ids(sampling.allowed_token_ids or [], "allowed_token_ids")
    if sampling.min_tokens > sampling.max_tokens:
        limit = f"at most {sampling.max_tokens} tokens may be generated"
        raise InvalidRequest(f"min_tokens is {sampling.min_tokens}, but {limit}", param="min_tokens")
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options may only be set together with stream: true", param="stream_options")
    if body.stream_options is not None and body.stream_options.include_obfuscation:
        raise InvalidRequest(
            "stream_options.include_obfuscation is not supported; leave it out", param="stream_options"
        )
    if body.kv_transfer_params is not None and sampling.prompt_logprobs is not None:
        raise InvalidRequest(
            "kv_transfer_params brings no log-probabilities of the prompt: leave out prompt_logprobs, and echo with"
            " logprobs",
            param="prompt_logprobs",
        )
    if body.kv_transfer_params is not None and count > 1:
        raise InvalidRequest("kv_transfer_params goes with one prompt and n of 1", param="kv_transfer_params")

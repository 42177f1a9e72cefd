"""The sampling parameters of a request: one struct from the API to the sampler."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tandem.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_STOP_TOKENS = 128
MAX_ALLOWED_TOKENS = 16_384
MAX_BANNED_RUNS = 256
MAX_RUN_TOKENS = 1024
MAX_COUNT = 2**31 - 1
MAX_REPETITION_PENALTY = 100.0
"A penalty divides or multiplies a logit; this and its inverse are far beyond any use, and far from overflow."

TokenId = Annotated[int, Meta(ge=0, lt=2**31)]


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Names and meanings are OpenAI's and, beyond those, vLLM's.

    Stop *strings* are not here: engines speak token ids, so the API looks for stop strings in the text.

    Ranges are vLLM's where it has one; where it has none, such that float32 neither overflows nor vanishes. Decoding
    keeps to them and refuses NaN and infinity; `check` does the same for what was made in this process.

    Attributes:
        seed: keys the random generator together with a token's position, so that the same request continues
            with the same tokens however it is batched or resumed.
        logprobs: number of most likely tokens to report beside the chosen one; None for no logprobs at all.
        allowed_token_ids: no others are chosen; None for all.
        banned_runs: runs of tokens that the output must not have; the API makes them of vLLM's `bad_words`.
        prompt_logprobs: the same for each token of the prompt but the first.
        stop_token_ids: end the request with finish reason "stop", as the model's end-of-sequence tokens do.
    """

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_COUNT)] = 16
    min_tokens: Annotated[int, Meta(ge=0, le=MAX_COUNT)] = 0
    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=0, le=MAX_COUNT)] = 0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=1 / MAX_REPETITION_PENALTY, le=MAX_REPETITION_PENALTY)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] = 0
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    logit_bias: Annotated[
        dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASED_TOKENS)
    ] = {}
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_STOP_TOKENS)] = []
    ignore_eos: bool = False
    prompt_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_ALLOWED_TOKENS)] | None = None
    banned_runs: Annotated[
        list[Annotated[list[TokenId], Meta(min_length=1, max_length=MAX_RUN_TOKENS)]], Meta(max_length=MAX_BANNED_RUNS)
    ] = []

    @property
    def uses_history(self) -> bool:
        """Whether choosing a token needs the tokens before it."""
        penalties = (self.repetition_penalty - 1.0, self.presence_penalty, self.frequency_penalty)
        return any(penalties)

    @property
    def adjusts_logits(self) -> bool:
        """Whether it has a say in which tokens may be chosen at all, whatever came before."""
        return bool(self.logit_bias) or self.allowed_token_ids is not None

    def check(self) -> None:
        """Raise InvalidRequest for a value out of range (msgspec checks ranges only when it decodes)."""
        try:
            msgspec.convert(msgspec.to_builtins(self, str_keys=False), SamplingParams)
        except msgspec.ValidationError as error:
            raise InvalidRequest(str(error)) from None
        if self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens is {self.min_tokens}, but at most {self.max_tokens} tokens may be generated",
                param="min_tokens",
            )

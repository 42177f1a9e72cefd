"""Admission: the limits of an engine, and the check of a new request against them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields

import msgspec

from tandem.errors import ConfigError, InvalidRequest, Overloaded
from tandem.ids import output_digest
from tandem.kv.blocks import BlockPool, PrefixChain
from tandem.scheduling.request import Request
from tandem.wire.messages import Generate, PullKv


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of an engine, each at least 1. Raises ConfigError otherwise.

    Attributes:
        max_num_seqs: most rows in a batch.
        max_batched_tokens: most tokens in a batch.
        max_waiting: most requests that may wait for admission.
        max_model_len: longest prompt and output together, in tokens.
        vocab_size: token ids are below this.
    """

    max_num_seqs: int
    max_batched_tokens: int
    max_waiting: int
    max_model_len: int
    vocab_size: int = 2**31

    def __post_init__(self) -> None:
        for limit in fields(self):
            if getattr(self, limit.name) < 1:
                raise ConfigError(f"{limit.name} must be at least 1; got {getattr(self, limit.name)}")


def new_request(
    message: Generate, limits: Limits, pool: BlockPool, eos_ids: frozenset[int], order: int, now: float
) -> Request:
    """Make the request that a message asks for. Raises InvalidRequest where it cannot end well on this engine."""
    _check(message, limits, pool)
    sampling = message.sampling
    tokens = list(message.token_ids)
    stop_tokens = frozenset(sampling.stop_token_ids)
    return Request(
        request_id=message.request_id,
        tokens=tokens,
        prompt_len=message.prompt_len,
        max_len=min(message.prompt_len + sampling.max_tokens, limits.max_model_len),
        sampling=msgspec.structs.replace(sampling, banned_runs=[]) if sampling.banned_runs else sampling,
        banned_runs=sampling.banned_runs,
        stop_tokens=stop_tokens if sampling.ignore_eos and message.grammar is None else stop_tokens | eos_ids,
        grammar=message.grammar,
        order=order,
        arrived_at=now,
        deadline=now + message.time_left,
        chain=PrefixChain(tokens, pool.block_size, message.cache_salt or ""),
        kv=message.kv,
        digest=output_digest(tokens[message.prompt_len :]),
    )


def _check(message: Generate, limits: Limits, pool: BlockPool) -> None:
    length, prompt_len = len(message.token_ids), message.prompt_len
    if not 1 <= prompt_len <= length:
        raise InvalidRequest(f"prompt_len is {prompt_len}, but it must be within the {length} token_ids that came")
    _check_tokens("prompt", message.token_ids, limits)
    message.sampling.check()
    _check_tokens("logit_bias", message.sampling.logit_bias, limits)
    _check_tokens("stop_token_ids", message.sampling.stop_token_ids, limits)
    _check_tokens("allowed_token_ids", message.sampling.allowed_token_ids or (), limits)
    for run in message.sampling.banned_runs:
        _check_tokens("bad_words", run, limits)
    if length - prompt_len >= message.sampling.max_tokens:
        raise InvalidRequest(
            f"nothing is left to generate: {length - prompt_len} output tokens came with the request, "
            f"max_tokens is {message.sampling.max_tokens}",
            param="max_tokens",
        )
    if length + 1 > limits.max_model_len:
        raise InvalidRequest(
            f"the prompt has {length} tokens, which leaves no room for output: this model serves at most "
            f"{limits.max_model_len} tokens, prompt and output together. Shorten the prompt.",
            param="prompt",
        )
    needed = pool.blocks_for(length + isinstance(message.kv, PullKv))
    if needed > pool.num_blocks:
        raise InvalidRequest(
            f"the prompt of {length} tokens needs {needed} KV blocks of {pool.block_size} tokens; this engine has "
            f"{pool.num_blocks}. Shorten the prompt or give the engine more --kv-memory.",
            param="prompt",
        )


def _check_tokens(param: str, tokens: Collection[int], limits: Limits) -> None:
    # One bad id would fail the whole batch in the embedding.
    bad = [token for token in tokens if not 0 <= token < limits.vocab_size]
    if bad:
        raise InvalidRequest(
            f"{param} has token id {bad[0]}; this model's vocabulary has {limits.vocab_size} tokens, from 0 on",
            param=param,
        )


def too_many(limits: Limits) -> Overloaded:
    """Return the refusal of a request that would wait behind `max_waiting` others."""
    return Overloaded(f"{limits.max_waiting} requests are waiting already; try again later", retry_after=1)

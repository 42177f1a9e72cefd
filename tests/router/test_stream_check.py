"""What an engine may say of a request, and everything else that it might."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from tandem.errors import EngineFailed
from tandem.router.stream_check import StreamCheck
from tandem.wire.messages import Address, Generate, Local, Prefill, PromptScores, PullKv, TokenLogprobs, Tokens
from tandem.wire.sampling import SamplingParams

VOCABULARY = 100
PULL = PullKv("p", "life", Address("127.0.0.1", 1), "r")
MAX_TOKENS = 4


def check(kv: Local | Prefill | PullKv | None = None, resumed: int = 0, logprobs: int | None = None) -> StreamCheck:
    sampling = SamplingParams(MAX_TOKENS, logprobs=logprobs)
    generate = Generate("r", [1] * (3 + resumed), 3, sampling, 60.0, kv or Local())
    return StreamCheck(generate, "e0", VOCABULARY)


def tokens(index: int, *token_ids: int, **fields: Any) -> Tokens:
    return msgspec.structs.replace(Tokens("r", index, list(token_ids)), **fields)


def end(index: int, *token_ids: int, reason: str = "length", **fields: Any) -> Tokens:
    return tokens(index, *token_ids, finish_reason=reason, done=True, **fields)


GOOD = {
    "one engine": (check(), [tokens(0, 0), tokens(1, 99, 5), end(3, 7)]),
    "a stop token": (check(), [end(0, 7, reason="stop", stop_token_id=7)]),
    "the first token": (check(Prefill()), [tokens(0, 5, done=True)]),
    "the first token, and it is the last": (check(Prefill()), [end(0, 5)]),
    "all but the first": (check(PULL), [tokens(1, 5), end(2, 6)]),
    "a decode engine that computes the prompt": (check(PULL), [tokens(0, 5), end(1, 6)]),
    "resumed": (check(PULL, resumed=2), [end(3, 6)]),
    "log-probabilities": (check(logprobs=1), [end(0, 5, logprobs=[TokenLogprobs(-0.5, [(5, -0.5)])])]),
    "a first token that is the last, of the prefill engine's choice": (check(PULL, logprobs=1), [end(0, 5)]),
    "none asked for but the own": (check(logprobs=0), [end(0, 5, logprobs=[TokenLogprobs(-math.inf, [])])]),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_engines_say_is_taken(name: str) -> None:
    stream, messages = GOOD[name]
    for message in messages:
        stream.take(message)
    assert stream.ended


LOGPROB = TokenLogprobs(-0.5, [(5, -0.5)])
BAD = {
    "token -1": (check(), [tokens(0, -1)]),
    "token 100, of a vocabulary of 100": (check(), [tokens(0, 100)]),
    f"token {2**63}, of": (check(), [tokens(0, 2**63)]),
    "5 tokens, of at most 4": (check(), [tokens(0, 1, 2, 3, 4), tokens(4, 5)]),
    "100000 tokens, of at most 4": (check(), [tokens(0, *[1] * 100_000)]),
    "2 tokens, of at most 1": (check(Prefill()), [tokens(0, 1, 2)]),
    "4 tokens, of at most 3": (check(Prefill(), resumed=2), [tokens(2, 1, 2)]),
    "token 1 of the output where token 0": (check(), [tokens(1, 5)]),
    "token 2 of the output where token 0": (check(PULL), [tokens(2, 5)]),
    "token 1 of the output where token 2": (check(resumed=2), [tokens(1, 5)]),
    "token 0 of the output where token 1": (check(), [tokens(0, 5), tokens(0, 5)]),
    "token 3 of the output where token 1": (check(), [tokens(0, 5), tokens(3, 5)]),
    "finish reason 'banana'": (check(), [end(0, 5, reason="banana")]),
    "finish reason 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx', ": (check(), [end(0, 5, reason="x" * 256)]),
    "finish reason length without a token": (check(), [end(0)]),
    "finish reason length without an end": (check(), [tokens(0, 5, finish_reason="length")]),
    "the end of its part without a finish reason": (check(), [tokens(0, 5, done=True)]),
    "end of its part without a finish": (check(PULL), [tokens(1, 5, done=True)]),
    "part without a finish reason": (check(Prefill()), [tokens(0, done=True)]),
    "without tokens and without an end": (check(), [tokens(0)]),
    "more after its end": (check(), [end(0, 5), tokens(1, 6)]),
    "stop token 6, which is not the last": (check(), [end(0, 5, reason="stop", stop_token_id=6)]),
    "a stop token without an end": (check(), [tokens(0, 5, stop_token_id=5)]),
    "that nobody asked for": (check(), [tokens(0, 5, logprobs=[LOGPROB])]),
    "log-probabilities of 0 tokens with 1 tokens": (check(logprobs=1), [tokens(0, 5)]),
    "log-probabilities of 1 tokens with 2 tokens": (check(logprobs=1), [tokens(0, 5, 6, logprobs=[LOGPROB])]),
    "the 1 most likely tokens, of at most 0": (check(logprobs=0), [tokens(0, 5, logprobs=[LOGPROB])]),
    "log-probability of token 100": (check(logprobs=1), [tokens(0, 5, logprobs=[TokenLogprobs(0.0, [(100, 0.0)])])]),
    "that is not a number": (check(logprobs=1), [tokens(0, 5, logprobs=[TokenLogprobs(math.nan, [])])]),
}


@pytest.mark.parametrize("problem", BAD)
def test_everything_else_fails_the_engine_with_a_short_word_of_what_came(problem: str) -> None:
    stream, messages = BAD[problem]
    for message in messages[:-1]:
        stream.take(message)
    with pytest.raises(EngineFailed, match="engine e0 sent what no engine may send") as caught:
        stream.take(messages[-1])
    assert problem in str(caught.value)
    assert len(str(caught.value)) < 200


def scores(start: int, *values: float, top: int = 0) -> PromptScores:
    return PromptScores("r", start, [TokenLogprobs(value, [(5, -0.5)] * top) for value in values])


def scored(**fields: Any) -> StreamCheck:
    made = check(Prefill())
    sampling = msgspec.structs.replace(made.generate.sampling, prompt_logprobs=1)
    return StreamCheck(msgspec.structs.replace(made.generate, sampling=sampling, **fields), "e0", VOCABULARY)


def test_the_prompts_log_probabilities_come_in_order_before_the_first_token() -> None:
    stream = scored()
    stream.take_scores(scores(1, -0.5, top=1))
    stream.take_scores(scores(2, -math.inf))
    stream.take(tokens(0, 5, done=True))
    assert stream.ended


@pytest.mark.parametrize(
    ("stream", "message", "why"),
    [
        (check(), scores(1, -1.0), "nobody asked for"),
        (scored(), scores(2, -1.0), "where 1 was next"),
        (scored(), scores(1, -1.0, -1.0, -1.0), "where 1 was next"),
        (scored(), scores(1, math.nan), "not a number"),
        (scored(), scores(1, -1.0, top=2), "at most 1"),
        (scored(), PromptScores("r", 1, [TokenLogprobs(-1.0, [(100, -1.0)])]), "vocabulary"),
    ],
)
def test_log_probabilities_of_a_prompt_that_cannot_be_are_refused(
    stream: StreamCheck, message: PromptScores, why: str
) -> None:
    with pytest.raises(EngineFailed, match=why):
        stream.take_scores(message)


def test_a_prompt_is_not_scored_again_after_its_first_token() -> None:
    stream = scored()
    stream.take(tokens(0, 5, done=True))
    with pytest.raises(EngineFailed, match="after its first token"):
        stream.take_scores(scores(1, -1.0))

"""What a client may ask of one deployment of a prefill and a decode engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import Deployment, flags
from tests.support.families import EOS, prompt_of
from tests.support.reference import Reference

SPLIT = flags(kv_memory="32MiB", max_batched_tokens=64, max_num_seqs=32)
SAMPLED: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.01,
    "ignore_eos": True,
    "max_tokens": 32,
}


@pytest.fixture(scope="module")
def split(serve: Serve) -> Deployment:
    return serve("qwen3", *SPLIT)


@pytest.fixture
def reference(reference_of: Callable[[str], Reference]) -> Reference:
    return reference_of("qwen3")


def mixed_load(count: int) -> list[tuple[list[int], int]]:
    """Prompts of mixed lengths and how many tokens to ask for."""
    return [(prompt_of(1 + 37 * i % 160, seed=1000 + i), 4 + 7 * i % 29) for i in range(count)]


def test_64_streaming_requests_at_once_all_match(split: Deployment, reference: Reference) -> None:
    load = mixed_load(64)
    with ThreadPoolExecutor(64) as threads:
        answers = [
            threads.submit(lambda p, n: split.http.stream(p, max_tokens=n, ignore_eos=True).token_ids(), prompt, tokens)
            for prompt, tokens in load
        ]
    for (prompt, tokens), answer in zip(load, answers, strict=True):
        assert answer.result() == reference(prompt, tokens), f"{len(prompt)} in, {tokens} out"


def test_a_prompt_seen_before_is_neither_computed_nor_moved_again(split: Deployment, reference: Reference) -> None:
    prompt = prompt_of(100, seed=7)
    first = split.http.complete(prompt, max_tokens=8, ignore_eos=True)
    second = split.http.complete(prompt, max_tokens=8, ignore_eos=True)
    assert first.token_ids == second.token_ids == reference(prompt, 8)
    assert first.how["prefix_tokens"] == {"prefill-0": 0, "decode-0": 0}
    assert second.how["prefix_tokens"] == {"prefill-0": 96, "decode-0": 96}
    assert (first.how["blocks"], second.how["blocks"]) == (7, 1)
    assert 0 < second.how["bytes"] < first.how["bytes"]
    assert second.json["usage"]["prompt_tokens_details"]["cached_tokens"] == 96


def test_a_longer_prompt_moves_only_what_is_new(split: Deployment, reference: Reference) -> None:
    start = prompt_of(64, seed=8)
    longer = start + prompt_of(64, seed=9)
    split.http.complete(start, max_tokens=2, ignore_eos=True)
    reply = split.http.complete(longer, max_tokens=8, ignore_eos=True)
    assert reply.token_ids == reference(longer, 8)
    assert reply.how["prefix_tokens"] == {"prefill-0": 64, "decode-0": 64}
    assert reply.how["blocks"] == 4


def test_what_was_said_is_part_of_the_next_prompt(split: Deployment, reference: Reference) -> None:
    prompt = prompt_of(40, seed=10)
    said = split.http.complete(prompt, max_tokens=40, ignore_eos=True).token_ids
    reply = split.http.complete(prompt + said + [1], max_tokens=8, ignore_eos=True)
    assert reply.token_ids == reference([*prompt, *said, 1], 8)
    assert reply.how["prefix_tokens"]["decode-0"] > reply.how["prefix_tokens"]["prefill-0"] == 32


def test_one_token_of_output_needs_no_decode_engine(split: Deployment, reference: Reference) -> None:
    prompt = prompt_of(33, seed=11)
    reply = split.http.complete(prompt, max_tokens=1, ignore_eos=True)
    assert reply.token_ids == reference(prompt, 1)
    assert reply.choice["finish_reason"] == "length"
    assert reply.how["reason"] == "it ended with the first token"


def test_a_seed_gives_the_same_tokens_again_and_on_any_engine(split: Deployment) -> None:
    prompt = prompt_of(50, seed=12)
    replies = [split.http.complete(prompt, seed=5, **SAMPLED) for _ in range(2)]
    replies += [split.engine(name).complete(prompt, seed=5, **SAMPLED) for name in ("prefill-0", "decode-0")]
    other = split.http.complete(prompt, seed=6, **SAMPLED)
    assert replies[0].token_ids == replies[1].token_ids == replies[2].token_ids == replies[3].token_ids
    assert other.token_ids != replies[0].token_ids


def test_penalties_count_the_first_token_wherever_it_was_made(split: Deployment) -> None:
    prompt = prompt_of(20, seed=13)
    penalties: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.5}
    reply = split.http.complete(prompt, max_tokens=32, ignore_eos=True, **penalties)
    alone = split.engine("decode-0").complete(prompt, max_tokens=32, ignore_eos=True, **penalties)
    plain = split.http.complete(prompt, max_tokens=32, ignore_eos=True)
    assert reply.token_ids == alone.token_ids
    assert reply.token_ids != plain.token_ids


def test_without_a_seed_answers_differ(split: Deployment) -> None:
    prompt = prompt_of(20, seed=14)
    replies = [split.http.complete(prompt, **SAMPLED) for _ in range(3)]
    assert len({tuple(reply.token_ids) for reply in replies}) > 1


def test_every_token_has_its_logprob_on_both_sides_of_the_hand_off(split: Deployment) -> None:
    prompt = prompt_of(20, seed=15)
    there = split.http.complete(prompt, max_tokens=6, ignore_eos=True, logprobs=3).choice["logprobs"]
    here = split.engine("decode-0").complete(prompt, max_tokens=6, ignore_eos=True, logprobs=3).choice["logprobs"]
    assert there["tokens"] == here["tokens"]
    assert there["token_logprobs"] == pytest.approx(here["token_logprobs"], abs=1e-3)
    assert len(there["token_logprobs"]) == len(there["top_logprobs"]) == 6
    for chosen, top in zip(there["token_logprobs"], there["top_logprobs"], strict=True):
        assert chosen == max(top.values()) < 0


def test_n_gives_as_many_choices_each_with_its_own_draw(split: Deployment) -> None:
    reply = split.http.complete(prompt_of(30, seed=16), n=2, seed=1, **SAMPLED)
    first, second = (choice["token_ids"] for choice in reply.json["choices"])
    assert first != second
    assert reply.json["usage"]["completion_tokens"] == 64
    again = split.http.complete(prompt_of(30, seed=16), n=2, seed=1, **SAMPLED)
    assert [first, second] == [choice["token_ids"] for choice in again.json["choices"]]


def test_n_greedy_choices_are_equal(split: Deployment, reference: Reference) -> None:
    prompt = prompt_of(30, seed=17)
    reply = split.http.complete(prompt, n=3, max_tokens=8, ignore_eos=True)
    assert [choice["token_ids"] for choice in reply.json["choices"]] == [reference(prompt, 8)] * 3


def test_several_prompts_are_answered_in_order(split: Deployment, reference: Reference) -> None:
    prompts = [prompt_of(length, seed=18) for length in (5, 70, 20)]
    reply = split.http.send(
        "POST",
        "/v1/completions",
        {"prompt": prompts, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True},
    )
    assert [choice["token_ids"] for choice in reply.json["choices"]] == [reference(prompt, 8) for prompt in prompts]


def test_a_stop_token_ends_the_answer(split: Deployment, reference: Reference) -> None:
    prompt = prompt_of(25, seed=19)
    tokens = reference(prompt, 24)
    stop = tokens[12]
    cut = tokens[: tokens.index(stop) + 1]
    reply = split.http.complete(prompt, max_tokens=24, ignore_eos=True, stop_token_ids=[stop])
    assert reply.token_ids == cut
    assert (reply.choice["finish_reason"], reply.choice["stop_reason"]) == ("stop", stop)


def test_a_stop_token_may_be_the_first_one(split: Deployment, reference: Reference) -> None:
    prompt = prompt_of(25, seed=20)
    stop = reference(prompt, 1)[0]
    reply = split.http.complete(prompt, max_tokens=24, ignore_eos=True, stop_token_ids=[stop])
    assert reply.token_ids == [stop]
    assert (reply.choice["finish_reason"], reply.choice["text"]) == ("stop", "")


def test_a_stop_string_ends_the_answer_before_it(split: Deployment) -> None:
    question = "Sort: hello"
    whole = split.http.complete(question, max_tokens=40, ignore_eos=True, logit_bias=LETTERS).choice["text"]
    stop = whole[11:14]
    reply = split.http.complete(question, max_tokens=40, ignore_eos=True, logit_bias=LETTERS, stop=stop)
    assert reply.choice["text"] == whole[: whole.index(stop)]
    assert (reply.choice["finish_reason"], reply.choice["stop_reason"]) == ("stop", stop)


LETTERS = {str(token): 30 for token in range(ord("a"), ord("z") + 1)}
"""The tokenizer is one of bytes; so this model writes text."""


def test_end_of_sequence_ends_the_answer_unless_it_is_ignored(split: Deployment) -> None:
    ending: dict[str, Any] = {"max_tokens": 10, "logit_bias": {str(EOS): 100}}
    prompt = prompt_of(25, seed=21)
    ended = split.http.complete(prompt, **ending)
    assert (ended.token_ids, ended.choice["finish_reason"], ended.choice["stop_reason"]) == ([EOS], "stop", None)
    ignored = split.http.complete(prompt, ignore_eos=True, **ending)
    assert (ignored.token_ids, ignored.choice["finish_reason"]) == ([EOS] * 10, "length")


def test_min_tokens_keeps_end_of_sequence_away(split: Deployment) -> None:
    reply = split.http.complete(prompt_of(25, seed=22), max_tokens=10, min_tokens=5, logit_bias={str(EOS): 100})
    assert len(reply.token_ids) == 6
    assert EOS not in reply.token_ids[:5]
    assert reply.token_ids[5] == EOS


@pytest.mark.parametrize("engine_id", ["prefill-0", "decode-0"])
def test_an_engine_of_any_role_answers_alone(engine_id: str, split: Deployment, reference: Reference) -> None:
    prompt = prompt_of(90, seed=23)
    reply = split.engine(engine_id).complete(prompt, max_tokens=8, ignore_eos=True)
    assert reply.token_ids == reference(prompt, 8)
    assert (reply.how["disaggregated"], reply.how["reason"]) == (False, "sent to this engine directly")
    assert reply.how["prefill_engine"] == reply.how["decode_engine"] == engine_id

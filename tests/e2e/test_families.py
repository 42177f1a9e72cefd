"""Every family of models answers exactly as transformers does, through prefill and decode engines and without."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.conftest import Serve
from tests.support.deployment import flags
from tests.support.families import prompt_of
from tests.support.reference import Reference

COMMON = ("--kv-memory", "16MiB", "--block-size", "16", "--max-batched-tokens", "64", "--max-num-seqs", "32")
LENGTHS = (1, 15, 16, 17, 300)
TOKENS = 24

DISAGGREGATED = [("nixl", family) for family in ("qwen3", "qwen3-tied", "qwen2", "llama3", "llama2", "mistral")]
DISAGGREGATED += [("tcp", "qwen3"), ("tcp", "llama3")]


@pytest.mark.parametrize(("connector", "family"), DISAGGREGATED)
def test_prefill_and_decode_engines_say_what_transformers_says(
    connector: str, family: str, serve: Serve, reference_of: Callable[[str], Reference]
) -> None:
    deployment = serve(family, *COMMON, "--connector", connector)
    for length in LENGTHS:
        prompt = prompt_of(length)
        reply = deployment.http.complete(prompt, max_tokens=TOKENS, ignore_eos=True)
        assert reply.token_ids == reference_of(family)(prompt, TOKENS), f"prompt of {length} tokens"
        how = reply.how
        assert (how["disaggregated"], how["reason"], how["transport"]) == (True, None, connector)
        assert (how["prefill_engine"], how["decode_engine"]) == ("prefill-0", "decode-0")
        assert how["blocks"] == -(-length // 16)


@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama2"])
def test_a_mixed_engine_says_what_transformers_says(
    family: str, serve: Serve, reference_of: Callable[[str], Reference]
) -> None:
    deployment = serve(family, *COMMON, "--prefill", "0")
    for length in LENGTHS:
        prompt = prompt_of(length)
        reply = deployment.http.complete(prompt, max_tokens=TOKENS, ignore_eos=True)
        assert reply.token_ids == reference_of(family)(prompt, TOKENS), f"prompt of {length} tokens"
        assert (reply.how["disaggregated"], reply.how["reason"]) == (False, "mixed engine")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_precision_answer_is_the_same_wherever_the_prompt_was_computed(dtype: str, serve: Serve) -> None:
    deployment = serve("qwen3", *COMMON, "--dtype", dtype)
    assert {engine["dtype"] for engine in deployment.engines().values()} == {dtype}
    prompt = prompt_of(100)
    split = deployment.http.complete(prompt, max_tokens=TOKENS, ignore_eos=True)
    alone = deployment.engine("decode-0").complete(prompt_of(100), max_tokens=TOKENS, ignore_eos=True)
    assert split.how["disaggregated"]
    assert len(split.token_ids) == TOKENS
    assert split.token_ids == alone.token_ids


def test_engines_with_different_block_sizes_share_a_request(
    serve: Serve, reference_of: Callable[[str], Reference]
) -> None:
    different = flags(prefill_block_size=16, decode_block_size=8)
    deployment = serve("qwen3", "--kv-memory", "16MiB", "--max-batched-tokens", "64", *different)
    for length in LENGTHS:
        prompt = prompt_of(length)
        reply = deployment.http.complete(prompt, max_tokens=TOKENS, ignore_eos=True)
        assert reply.token_ids == reference_of("qwen3")(prompt, TOKENS), f"prompt of {length} tokens"
        assert reply.how["disaggregated"]

"""What `LLM` makes of its arguments, before any process is started."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tandem.api.openai import ChatBody, CompletionBody
from tandem.api.parsing import parse, sampling_params
from tandem.errors import ConfigError, InvalidRequest
from tandem.llm import (
    Prompt,
    _chat_logprobs,
    blocking,
    cluster_config,
    conversations,
    params_list,
    prompt_list,
    request_fields,
)
from tandem.wire.sampling import SamplingParams

UNUSUAL = SamplingParams(
    max_tokens=7,
    min_tokens=2,
    temperature=0.5,
    top_p=0.9,
    top_k=11,
    min_p=0.05,
    repetition_penalty=1.1,
    presence_penalty=0.2,
    frequency_penalty=-0.3,
    seed=99,
    logprobs=3,
    logit_bias={5: -1.5},
    stop_token_ids=[4],
    ignore_eos=True,
    allowed_token_ids=[5, 6],
    prompt_logprobs=2,
)


def sent(body: dict[str, Any]) -> bytes:
    return msgspec.json.encode(body)


def test_every_sampling_field_reaches_the_completions_api() -> None:
    unset = [
        name for name in SamplingParams.__struct_fields__ if getattr(UNUSUAL, name) == getattr(SamplingParams(), name)
    ]
    assert unset == ["banned_runs"]
    body = parse(sent({"prompt": "a", **request_fields(UNUSUAL, ["x"]), "logprobs": UNUSUAL.logprobs}), CompletionBody)
    assert body.max_tokens is not None
    assert sampling_params(body, body.max_tokens, body.logprobs) == UNUSUAL
    assert body.stop == ["x"]
    assert body.return_token_ids


@pytest.mark.parametrize("params", [UNUSUAL, SamplingParams()])
def test_every_sampling_field_reaches_the_chat_api(params: SamplingParams) -> None:
    messages = [{"role": "user", "content": "a"}]
    body = parse(sent({"messages": messages, **request_fields(params, None), **_chat_logprobs(params)}), ChatBody)
    assert body.max_tokens is not None
    assert sampling_params(body, body.max_tokens, body.top_logprobs) == params
    assert body.stop is None


def test_params_out_of_range_are_refused_before_they_are_sent() -> None:
    with pytest.raises(InvalidRequest, match="top_p"):
        request_fields(SamplingParams(top_p=2.0), None)
    with pytest.raises(InvalidRequest, match="bad_words"):
        request_fields(SamplingParams(banned_runs=[[1]]), None)


def test_one_params_for_all_prompts_gives_each_its_own_seed() -> None:
    assert [one.seed for one in params_list(SamplingParams(seed=5), 3)] == [5, 6, 7]
    assert [one.seed for one in params_list(None, 2)] == [0, 1]


def test_params_for_each_prompt_are_taken_as_they_are() -> None:
    given = [SamplingParams(seed=5), SamplingParams(seed=5)]
    assert params_list(given, 2) == given
    with pytest.raises(InvalidRequest, match="3 prompts and 2"):
        params_list(given, 3)


def test_one_prompt_or_several_may_be_given() -> None:
    assert prompt_list("abc") == ["abc"]
    assert prompt_list([1, 2]) == [[1, 2]]
    mixed: list[Prompt] = [[1], "b"]
    assert prompt_list(mixed) == mixed
    assert prompt_list([]) == []
    with pytest.raises(InvalidRequest, match="prompt 1"):
        prompt_list(["a", None])  # type: ignore[arg-type]


def test_one_conversation_or_several_may_be_given() -> None:
    one = [{"role": "user", "content": "a"}]
    assert conversations(one) == [one]
    assert conversations([one, one]) == [one, one]


def test_flags_go_to_their_sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = tmp_path / "key"
    key.touch()
    monkeypatch.chdir(tmp_path)
    config = cluster_config({"kv_memory": "1MiB", "cluster_key_file": "key", "threads": 3, "prefill": 2})
    assert config.cache.kv_memory == 2**20
    assert config.access.cluster_key_file == key
    assert config.run.threads == 3
    assert config.prefill == 2


def test_an_llm_is_quiet_and_takes_any_free_port() -> None:
    config = cluster_config({})
    assert (config.host, config.port, config.run.log_level) == ("127.0.0.1", 0, "warning")
    assert cluster_config({"log_level": "info"}).run.log_level == "info"


@pytest.mark.parametrize("name", ["max_num_seq", "host", "port"])
def test_an_unknown_flag_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{name}'.*max_num_seqs.*prefill_tp"):
        cluster_config({name: 3})


def test_a_flag_with_a_wrong_value_is_named() -> None:
    with pytest.raises(ConfigError, match="--kv-memory must be a size"):
        cluster_config({"kv_memory": "much"})
    with pytest.raises(ConfigError, match="--prefill must be 0 or more"):
        cluster_config({"prefill": -1})


def test_work_is_done_also_where_an_event_loop_runs() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 3

    async def notebook_cell() -> int:
        return blocking(work())

    assert blocking(work()) == 3
    assert asyncio.run(notebook_cell()) == 3

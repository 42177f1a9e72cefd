"""Followers, which are told only what is new, compute what an engine of one rank computes: also where requests are
preempted, resumed, share a prefix, and come in larger number than ranks keep tables of."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.processes import until

PENALTIES: dict[str, Any] = {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3}
HEAD = prompt_of(32, seed=1)
PROMPTS = [[*HEAD, *prompt_of(20, seed=70 + i)] for i in range(10)]
OUTPUT = 100


def options_of(index: int) -> dict[str, Any]:
    return {"max_tokens": OUTPUT, "ignore_eos": True} | (PENALTIES if index % 2 else {})


@pytest.fixture(scope="module")
def right(folder_of: Callable[[str], Path]) -> list[list[int]]:
    """One after the other, on one rank with room for all."""
    with Deployment(folder_of("qwen3"), *flags(prefill=0, kv_memory="16MiB")) as alone:
        found = [alone.http.complete(prompt, **options_of(i)).token_ids for i, prompt in enumerate(PROMPTS)]
        assert sum(engine["counters"]["preemptions"] for engine in alone.engines().values()) == 0
    return found


@pytest.mark.parametrize("shape", [{"decode_tp": 2}, {"decode_pp": 2}], ids=["tp2", "pp2"])
def test_followers_compute_what_one_rank_does(
    shape: dict[str, int], right: list[list[int]], folder_of: Callable[[str], Path]
) -> None:
    """A rank holds half of a block here, so it has 20 of them; four requests run at a time."""
    small = flags(prefill=0, kv_memory="160KiB", max_num_seqs=4, max_batched_tokens=64, **shape)
    with Deployment(folder_of("qwen3"), *small) as deployment:
        [engine] = deployment.engines().values()
        assert engine["kv"]["blocks"] == 20
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            given = enumerate(PROMPTS)
            replies = list(threads.map(lambda one: deployment.http.complete(one[1], **options_of(one[0])), given))
        assert [reply.token_ids for reply in replies] == right

        def counters() -> dict[str, int]:
            [now] = deployment.engines().values()
            found: dict[str, int] = now["counters"]
            return found

        assert until(lambda: counters()["preemptions"] > 0, 10)
        assert until(lambda: counters()["prefix_tokens"] > 0, 10)

"""A rank that hangs: its engine is not used, its requests go elsewhere, and it ends with a reason."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.processes import until
from tests.support.reference import Reference

STEP_TIMEOUT = 12
BOUND = 60.0
"""Seconds; a quiet machine needs STEP_TIMEOUT and a few."""

Start = Callable[[int], Deployment]


@pytest.fixture
def start(folder_of: Callable[[str], Path]) -> Iterator[Start]:
    """Starts so many engines of two ranks that do both prefill and decode."""
    running: list[Deployment] = []

    def begin(engines: int) -> Deployment:
        options = flags(prefill=0, decode=engines, decode_tp=2, kv_memory="16MiB", connector="tcp")
        running.append(Deployment(folder_of("qwen3"), *options, *flags(step_timeout=STEP_TIMEOUT)))
        return running[-1]

    yield begin
    for deployment in running:
        deployment.kill()


def stop_a_follower(deployment: Deployment, engine_id: str) -> None:
    os.kill(deployment.engines()[engine_id]["ranks"][1]["pid"], signal.SIGSTOP)


def test_an_engine_with_a_rank_that_hangs_is_not_used_and_ends_with_a_reason(start: Start) -> None:
    deployment = start(1)
    stop_a_follower(deployment, "mixed-0")
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(deployment.http.complete, prompt_of(20), max_tokens=4, ignore_eos=True)
        assert until(lambda: deployment.http.get("/health").status == 503, BOUND), deployment.log
        engine = deployment.engines()["mixed-0"]
        assert engine["state"] == "stalled"
        assert engine["reason"].startswith("a step of it has run for ")
        assert until(lambda: f"raise --step-timeout ({STEP_TIMEOUT} s)" in deployment.log, BOUND), deployment.log
        deployment.kill()
        assert asked.exception() is not None or asked.result().status >= 500


def test_requests_on_an_engine_with_a_rank_that_hangs_are_answered_by_another(
    start: Start, reference_of: Callable[[str], Reference]
) -> None:
    deployment, reference = start(2), reference_of("qwen3")
    stop_a_follower(deployment, "mixed-0")
    prompts = [prompt_of(20 + number, seed=number) for number in range(6)]
    with ThreadPoolExecutor(len(prompts)) as threads:
        replies = list(threads.map(lambda p: deployment.http.complete(p, max_tokens=6, ignore_eos=True), prompts))
    assert [reply.token_ids for reply in replies] == [reference(prompt, 6) for prompt in prompts]
    assert {reply.how["decode_engine"] for reply in replies} == {"mixed-1"}
    assert any(reply.how["recomputations"] for reply in replies), "some were on the engine that hangs"

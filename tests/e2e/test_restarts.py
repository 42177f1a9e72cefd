"""`tandem serve` keeps serving: whatever of it is killed is started anew, and the rest goes on."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.deployment import Deployment, flags
from tests.support.families import prompt_of
from tests.support.processes import fork_server_of, is_alive, listening_on, survivors, until
from tests.support.reference import Reference

PATIENCE = 60.0
PAUSE_SECONDS = 9.0
PROMPT = prompt_of(90)


@pytest.fixture(scope="module")
def split(folder_of: Callable[[str], Path]) -> Iterator[Deployment]:
    arguments = flags(kv_memory="16MiB", connector="tcp", decode_tp=2)
    with Deployment(folder_of("qwen3"), *arguments) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def right(reference_of: Callable[[str], Reference]) -> list[int]:
    return reference_of("qwen3")(PROMPT, 24)


def lives(deployment: Deployment) -> dict[str, str]:
    """The incarnation of each engine that the router uses."""
    return {name: one["incarnation"] for name, one in deployment.engines().items() if one["state"] == "ready"}


def rank(deployment: Deployment, engine: str, number: int) -> int:
    pid: int = deployment.engines()[engine]["ranks"][number]["pid"]
    return pid


def is_whole(deployment: Deployment) -> bool:
    [peer] = deployment.engines().get("decode-0", {"peers": [{"state": "none"}]})["peers"] or [{"state": "none"}]
    return len(lives(deployment)) == 2 and peer["state"] == "ready" and deployment.http.get("/health").status == 200


def check_answer(deployment: Deployment, right: list[int]) -> None:
    reply = deployment.http.complete(PROMPT, max_tokens=24, ignore_eos=True)
    assert reply.token_ids == right
    assert reply.how["disaggregated"], reply.how


@pytest.mark.parametrize("engine", ["prefill-0", "decode-0"])
def test_an_engine_that_was_paused_under_load_goes_on(engine: str, split: Deployment, right: list[int]) -> None:
    """Longer than the heartbeats' patience: a virtual machine that migrates, a laptop's lid."""
    assert until(lambda: is_whole(split), PATIENCE), split.log
    before = lives(split)
    with ThreadPoolExecutor(8) as clients:
        answers = [
            clients.submit(split.http.complete, prompt_of(60, seed), max_tokens=200, ignore_eos=True)
            for seed in range(8)
        ]
        ranks = [one["pid"] for one in split.engines()[engine]["ranks"]]
        assert until(lambda: split.engines()["decode-0"]["requests"]["running"], PATIENCE)
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(PAUSE_SECONDS)  # is what is tested
        for pid in ranks:
            os.kill(pid, signal.SIGCONT)
        for answer in answers:
            answer.result()  # with an outcome, whatever it is
    assert until(lambda: is_whole(split), PATIENCE), split.log
    assert lives(split) == before, split.log
    check_answer(split, right)


@pytest.mark.parametrize(
    ("engine", "number"), [("prefill-0", 0), ("decode-0", 0), ("decode-0", 1)], ids=["prefill", "leader", "follower"]
)
def test_an_engine_of_which_a_rank_is_killed_comes_back(
    engine: str, number: int, split: Deployment, right: list[int]
) -> None:
    assert until(lambda: is_whole(split), PATIENCE), split.log
    before = lives(split)
    ranks = {one["pid"] for one in split.engines()[engine]["ranks"]}
    api = split.engine(engine).url
    os.kill(rank(split, engine, number), signal.SIGKILL)
    assert until(lambda: engine in (now := lives(split)) and now[engine] != before[engine], PATIENCE), split.log
    assert until(lambda: is_whole(split), PATIENCE), split.log
    after = lives(split)
    assert {name for name in after if after[name] != before[name]} == {engine}
    assert not survivors(ranks, 0.0), "the other ranks of that life are gone"
    assert split.engine(engine).url == api
    assert f"{engine} rank {number} was killed by SIGKILL" in split.log or "of this engine was lost" in split.log
    assert f"tandem: {engine} is back" in split.log
    check_answer(split, right)


def test_an_engine_whose_api_is_killed_comes_back(split: Deployment, right: list[int]) -> None:
    assert until(lambda: is_whole(split), PATIENCE), split.log
    before, url = lives(split), split.engine("prefill-0").url
    [api] = listening_on(int(url.rpartition(":")[2])) - {split.process.pid}
    os.kill(api, signal.SIGKILL)
    assert until(lambda: lives(split).get("prefill-0") not in (None, before["prefill-0"]), PATIENCE), split.log
    assert split.engine("prefill-0").get("/health").status == 200
    assert until(lambda: is_whole(split), PATIENCE), split.log
    check_answer(split, right)


def test_the_router_comes_back_at_its_port_and_the_engines_live_on(split: Deployment, right: list[int]) -> None:
    assert until(lambda: is_whole(split), PATIENCE), split.log
    before = lives(split)
    [router] = listening_on(int(split.http.url.rpartition(":")[2])) - {split.process.pid}
    os.kill(router, signal.SIGKILL)
    assert until(lambda: is_whole(split), PATIENCE), split.log
    assert lives(split) == before
    check_answer(split, right)


def test_a_fork_server_that_is_killed_is_replaced_when_it_is_needed(split: Deployment, right: list[int]) -> None:
    assert until(lambda: is_whole(split), PATIENCE), split.log
    before, server = lives(split), fork_server_of(split.process.pid)
    os.kill(server, signal.SIGKILL)
    assert until(lambda: not is_alive(server), PATIENCE)
    check_answer(split, right)
    assert lives(split) == before, "what it had started goes on"
    os.kill(rank(split, "prefill-0", 0), signal.SIGKILL)
    assert until(lambda: lives(split).get("prefill-0") not in (None, before["prefill-0"]), PATIENCE), split.log
    assert "prefill-0 rank 0 has ended, nobody knows how: the fork server" in split.log
    assert until(lambda: is_whole(split), PATIENCE), split.log
    check_answer(split, right)

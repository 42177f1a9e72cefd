"""SIGTERM of `tandem engine`: clients notice nothing, and the engine ends with 0."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.deployment import START_SECONDS, Deployment, flags
from tests.support.families import prompt_of
from tests.support.processes import until
from tests.support.reference import Reference

PATIENCE = 30.0


@pytest.fixture
def router() -> Iterator[Deployment]:
    with Deployment(*flags(control_port=0), command="router") as deployment:
        yield deployment


@pytest.fixture
def engine(router: Deployment, folder_of: Callable[[str], Path]) -> Iterator[Callable[..., Deployment]]:
    [control] = re.findall(r"--router (\S+)", router.log)
    with ExitStack() as stack:

        def start(name: str, **options: object) -> Deployment:
            arguments = flags(engine_id=name, router=control, kv_memory="16MiB", connector="tcp", **options)
            made = Deployment(folder_of("qwen3"), *arguments, command="engine", wait=False)
            stack.callback(made.kill)
            assert until(lambda: f"{name} ready: " in made.log, START_SECONDS), made.log
            return made

        yield start


def states(router: Deployment) -> dict[str, str]:
    return {name: one["state"] for name, one in router.engines().items()}


def test_running_requests_end_well_and_new_ones_go_to_another_engine(
    router: Deployment, engine: Callable[..., Deployment], reference_of: Callable[[str], Reference]
) -> None:
    old, _ = engine("old", drain_timeout=60), engine("new")
    assert until(lambda: states(router) == {"old": "ready", "new": "ready"}, PATIENCE)
    right = reference_of("qwen3")(prompt_of(30), 8)
    with ThreadPoolExecutor(6) as clients:
        answers = [
            clients.submit(router.http.complete, prompt_of(40), max_tokens=900, ignore_eos=True) for _ in range(6)
        ]
        assert until(lambda: all(one["requests"]["running"] for one in router.engines().values()), PATIENCE)
        old.process.send_signal(signal.SIGTERM)
        assert until(lambda: states(router).get("old", "gone") != "ready", PATIENCE)
        reply = router.http.complete(prompt_of(30), max_tokens=8, ignore_eos=True)
        assert (reply.token_ids, reply.how["decode_engine"]) == (right, "new")
        replies = [answer.result() for answer in answers]
    assert {len(reply.token_ids) for reply in replies} == {900}
    assert len({tuple(reply.token_ids) for reply in replies}) == 1
    assert {reply.how["decode_engine"] for reply in replies} == {"old", "new"}, "what ran there ended there"
    assert old.wait(PATIENCE) == 0, old.log
    assert until(lambda: states(router) == {"new": "ready"}, PATIENCE)


def test_a_second_sigterm_ends_it_at_once(router: Deployment, engine: Callable[..., Deployment]) -> None:
    only = engine("only", drain_timeout=600)
    assert until(lambda: states(router) == {"only": "ready"}, PATIENCE)
    stream = router.http.stream(prompt_of(40), max_tokens=900, ignore_eos=True)
    next(iter(stream))
    only.process.send_signal(signal.SIGTERM)
    assert until(lambda: "takes no new requests" in only.log, PATIENCE)
    only.process.send_signal(signal.SIGTERM)
    assert only.wait(PATIENCE) == 0
    stream.close()

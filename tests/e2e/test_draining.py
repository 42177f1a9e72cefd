"""SIGTERM of `tandem engine`, and `tandem drain`: clients notice nothing, and the engine ends with 0."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.deployment import START_SECONDS, Deployment, flags, run_tandem
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
    assert until(lambda: "--router " in router.log, PATIENCE), router.log
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
    assert {reply.how["decode_engine"] for reply in replies} == {"old", "new"}, old.log
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


def test_tandem_drain_ends_an_engine_as_sigterm_does(
    router: Deployment, engine: Callable[..., Deployment], reference_of: Callable[[str], Reference]
) -> None:
    old, _ = engine("old", drain_timeout=60, tp=2), engine("new")
    assert until(lambda: states(router) == {"old": "ready", "new": "ready"}, PATIENCE)
    right = reference_of("qwen3")(prompt_of(40), 600)
    with ThreadPoolExecutor(6) as clients:
        answers = [
            clients.submit(router.http.complete, prompt_of(40), max_tokens=600, ignore_eos=True) for _ in range(6)
        ]
        assert until(lambda: all(one["requests"]["running"] for one in router.engines().values()), PATIENCE)
        drained = run_tandem("drain", "old", *flags(url=router.http.url))
        assert (drained.code, drained.out.splitlines()[-1]) == (0, "old is gone"), drained
        replies = [answer.result() for answer in answers]
    assert [reply.token_ids for reply in replies] == [right] * 6
    assert {reply.how["decode_engine"] for reply in replies} == {"old", "new"}, old.log
    assert old.wait(PATIENCE) == 0, old.log
    assert "old has drained and ended: it was drained" in old.log
    assert set(states(router)) == {"new"}


def test_tandem_drain_says_what_is_wrong(router: Deployment, engine: Callable[..., Deployment]) -> None:
    only = engine("only")
    assert until(lambda: states(router) == {"only": "ready"}, PATIENCE)
    unknown = run_tandem("drain", "other", *flags(url=router.http.url))
    assert (unknown.code, unknown.err) == (1, f"tandem: {router.http.url} has no engine 'other'; it has only\n")
    [api] = {engine["http_address"] for engine in router.engines().values()}
    wrong = run_tandem("drain", "only", *flags(url=f"http://{api}"))
    assert wrong.code == 1
    assert "this is an engine's own API; give the URL of a router's API" in wrong.err
    nobody = run_tandem("role", "only", "decode", *flags(url="http://127.0.0.1:9"))
    assert (nobody.code, "http://127.0.0.1:9 cannot be reached" in nobody.err) == (1, True)
    assert run_tandem("role", "only", "both", *flags(url=router.http.url)).code == 2
    assert only.process.poll() is None


def test_of_a_cluster_with_an_api_key_only_its_holders_drain_engines(folder_of: Callable[[str], Path]) -> None:
    options = flags(api_key="secret", prefill=0, decode=2, kv_memory="16MiB", connector="tcp")
    with ExitStack() as stack:
        served = Deployment(folder_of("qwen3"), *options)
        stack.callback(served.kill)
        command = ["drain", "mixed-0", *flags(url=served.http.url)]
        for key in ({}, {"TANDEM_API_KEY": "other"}):
            refused = run_tandem(*command, environment=key)
            assert (refused.code, "TANDEM_API_KEY or --api-key" in refused.err) == (1, True), refused
        assert states(served) == {"mixed-0": "ready", "mixed-1": "ready"}
        drained = run_tandem(*command, environment={"TANDEM_API_KEY": "secret"})
        assert (drained.code, drained.out.splitlines()[-1]) == (0, "mixed-0 is gone"), drained
        assert until(lambda: "it is not started anew" in served.log, PATIENCE), served.log
        assert states(served) == {"mixed-1": "ready"}
        assert run_tandem("drain", "mixed-1", *flags(url=served.http.url, api_key="secret")).code == 0
        assert served.wait(PATIENCE) == 0, served.log
        assert "all engines have drained" in served.log
        assert not served.pids

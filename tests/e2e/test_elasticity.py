"""Engines and routers come and go under load: no answer is lost, and none is wrong."""

from __future__ import annotations

import itertools
import re
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.deployment import START_SECONDS, Deployment, flags, run_tandem
from tests.support.families import prompt_of
from tests.support.http import Http
from tests.support.processes import until
from tests.support.reference import Reference

PATIENCE = 60.0
PROMPT = prompt_of(90)
TOKENS = 48
CLIENTS = 4


class Cluster:
    """Routers and engines, each a command of its own."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack = stack
        self._folder = folder
        self.routers: list[Deployment] = []
        self.controls: list[str] = []
        self.engines: dict[str, Deployment] = {}

    def start_router(self, control: str = "127.0.0.1:0") -> Deployment:
        port = control.rpartition(":")[2]
        made = Deployment(*flags(control_port=port), command="router")
        self._stack.callback(made.kill)
        assert until(lambda: "--router " in made.log, PATIENCE), made.log
        if port == "0":
            self.controls += re.findall(r"--router (\S+)", made.log)
        self.routers.append(made)
        return made

    def start_engine(self, name: str) -> Deployment:
        """Start an engine, `name` being its role and a number; returns once all routers use it."""
        options = flags(engine_id=name, role=name.partition("-")[0], kv_memory="16MiB", connector="tcp", threads=1)
        routers = [word for control in self.controls for word in ("--router", control)]
        made = Deployment(self._folder, *options, *routers, command="engine", wait=False)
        self._stack.callback(made.kill)
        assert until(lambda: f"{name} ready: " in made.log, START_SECONDS), made.log
        self.engines[name] = made
        for router in self.routers:
            assert until(lambda router=router: state(router, name) == "ready", PATIENCE), router.log  # type: ignore[misc]
        return made


def state(router: Deployment, name: str) -> str | None:
    """What a router says of an engine."""
    found = router.engines().get(name)
    return None if found is None else found["state"]


def sessions(router: Deployment) -> list[dict[str, Any]]:
    """Those of decode-0, as a router knows them."""
    found: list[dict[str, Any]] = router.engines()["decode-0"]["peers"]
    return found


@pytest.fixture
def cluster(folder_of: Callable[[str], Path]) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack, folder_of("qwen3"))


@pytest.fixture(scope="module")
def right(reference_of: Callable[[str], Reference]) -> list[int]:
    return reference_of("qwen3")(PROMPT, TOKENS)


@contextmanager
def load(http: Http) -> Iterator[list[Future[list[list[int]]]]]:
    """Clients that stream one answer after the other until the block ends; then each has what it got."""
    stop = threading.Event()

    def ask() -> list[list[int]]:
        answers = []
        while not stop.is_set():
            answers.append(http.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True).token_ids())
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(ask) for _ in range(CLIENTS)]
        try:
            yield clients
        finally:
            stop.set()


def check(clients: list[Future[list[list[int]]]], right: list[int]) -> None:
    for answers in (client.result() for client in clients):
        assert answers
        assert all(answer == right for answer in answers)


def test_a_rolling_restart_of_all_engines_under_load_loses_nothing(cluster: Cluster, right: list[int]) -> None:
    router = cluster.start_router()
    names = ["prefill-0", "prefill-1", "decode-0", "decode-1"]
    for name in names:
        cluster.start_engine(name)
    with load(router.http) as clients:
        for name, by_command in zip(names, itertools.cycle((True, False)), strict=False):
            engine = cluster.engines[name]
            if by_command:
                drained = run_tandem("drain", name, *flags(url=router.http.url))
                assert (drained.code, drained.out.splitlines()[-1]) == (0, f"{name} is gone"), drained
            else:
                engine.process.send_signal(signal.SIGTERM)
            assert engine.wait(PATIENCE) == 0, engine.log
            cluster.start_engine(name)
    check(clients, right)
    assert router.http.complete(PROMPT, max_tokens=TOKENS).how["disaggregated"]


def test_a_router_restarts_and_the_requests_of_another_one_go_on_undisturbed(
    cluster: Cluster, right: list[int]
) -> None:
    first, second = cluster.start_router(), cluster.start_router()
    for name in ("prefill-0", "decode-0"):
        cluster.start_engine(name)
    before = {name: one["incarnation"] for name, one in second.engines().items()}
    for router in (first, second):
        assert router.http.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True).token_ids == right
    assert until(lambda: [one["state"] for one in sessions(second)] == ["ready"], PATIENCE), sessions(second)
    session = sessions(second)
    with load(second.http) as clients:
        lost = first.http.stream(PROMPT, max_tokens=900, ignore_eos=True)
        next(iter(lost))
        first.kill()
        lost.close()
        again = cluster.start_router(cluster.controls[0])
        assert until(lambda: again.http.get("/health").json["detail"] == "ready", PATIENCE), again.log
        reply = again.http.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True)
        assert (reply.token_ids, reply.how["disaggregated"]) == (right, True)
    check(clients, right)
    assert {name: one["incarnation"] for name, one in second.engines().items()} == before
    assert sessions(second) == session, "no handshake was made again"
    assert not re.findall(r" W .*request", second.log), second.log


def test_decode_engines_serve_alone_while_there_is_no_prefill_engine(cluster: Cluster, right: list[int]) -> None:
    router = cluster.start_router()
    for name in ("prefill-0", "decode-0"):
        cluster.start_engine(name)
    with load(router.http) as clients:
        assert run_tandem("drain", "prefill-0", *flags(url=router.http.url)).code == 0
        alone = router.http.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True)
        assert (alone.token_ids, alone.how["reason"]) == (right, "no prefill engine is ready")
        health = router.http.get("/health")
        assert (health.status, "decode engines serve alone" in health.json["detail"]) == (200, True)
        cluster.start_engine("prefill-0")
        assert router.http.complete(prompt_of(91), max_tokens=TOKENS).how["disaggregated"]
    check(clients, right)


def test_an_engine_changes_its_role_under_load(cluster: Cluster, right: list[int]) -> None:
    router = cluster.start_router()
    for name in ("decode-0", "decode-1"):
        cluster.start_engine(name)

    def change(name: str, role: str) -> None:
        changed = run_tandem("role", name, role, *flags(url=router.http.url))
        assert (changed.code, changed.out) == (0, f"{name} is a {role} engine now\n"), changed
        assert router.engines()[name]["role"] == role

    with load(router.http) as clients:
        change("decode-0", "prefill")
        how = router.http.complete(prompt_of(92), max_tokens=TOKENS, ignore_eos=True).how
        assert (how["prefill_engine"], how["decode_engine"], how["disaggregated"]) == ("decode-0", "decode-1", True)
        change("decode-1", "prefill")
        change("decode-0", "decode")
        how = router.http.complete(prompt_of(93), max_tokens=TOKENS, ignore_eos=True).how
        assert (how["prefill_engine"], how["decode_engine"], how["disaggregated"]) == ("decode-1", "decode-0", True)
        change("decode-1", "mixed")
        assert run_tandem("drain", "decode-0", *flags(url=router.http.url)).code == 0
        how = router.http.complete(PROMPT, max_tokens=TOKENS, ignore_eos=True).how
        assert (how["decode_engine"], how["reason"]) == ("decode-1", "mixed engine")
    check(clients, right)

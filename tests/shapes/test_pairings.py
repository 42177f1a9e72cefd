"""Engines that do not fit refuse each other; the router uses the others, and says why when none is left."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from scripts.make_random_model import RandomModel, write_random_model

import tandem
from tandem.config import (
    BatchSection,
    CacheSection,
    EngineConfig,
    KvFailure,
    ModelSection,
    NetworkSection,
    RouterConfig,
    RunSection,
    TimeSection,
)
from tandem.console import Console
from tandem.engine.start.launch import EngineProcesses
from tandem.local_cluster import RouterProcess, start_engines, start_router, wait_ready
from tandem.model_folder import ModelFolder
from tandem.processes import ChildProcesses
from tandem.wire.control_messages import Role
from tests.support.reference import greedy

PROMPT = [7, 3, 250, 9, 4] * 9
SECONDS = 120.0


def folder(path: Path, seed: int) -> Path:
    model = RandomModel(
        family="llama", hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=280,
        dtype="float32", seed=seed,
    )  # fmt: skip
    return write_random_model(path, model, Path(tandem.__file__).parent / "demo_model")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("fits") / "random", 1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder(tmp_path_factory.mktemp("other") / "random", 2)


@pytest.fixture
def family() -> Iterator[ChildProcesses]:
    with ChildProcesses() as children:
        yield children


def config(
    role: Role, path: Path, dtype: Any = "float32", connector: str = "tcp", kv_failure: KvFailure = "recompute"
) -> tuple[EngineConfig, ModelFolder]:
    made = EngineConfig(
        role=role,
        model=ModelSection(dtype=dtype),
        cache=CacheSection(16, 4 << 20),
        batch=BatchSection(max_num_seqs=8, max_batched_tokens=32),
        network=NetworkSection(connector=connector),
        time=TimeSection(start_timeout=SECONDS, lease_ttl=3.0),
        run=RunSection(kv_failure, threads=1, log_level="warning"),
    )
    return made, ModelFolder(str(path), "random")


def start(
    family: ChildProcesses, *engines: tuple[str, tuple[EngineConfig, ModelFolder]]
) -> tuple[RouterProcess, dict[str, EngineProcesses]]:
    quick, quiet = TimeSection(route_timeout=0.5), RunSection(log_level="warning")
    router = start_router(family, RouterConfig(port=0, control_port=0, time=quick, run=quiet), None)
    started = [start_engine(family, name, *engine, router) for name, engine in engines]
    wait_ready(family, started, SECONDS)
    return router, {engine.name: engine for engine in started}


def start_engine(
    family: ChildProcesses, name: str, each: EngineConfig, model: ModelFolder, router: RouterProcess
) -> EngineProcesses:
    [engine] = start_engines(family, [replace(each, engine_id=name)], model, [router.control], None, Console())
    return engine


def ask(router: RouterProcess, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://{router.http}{path}",
        data=json.dumps(body).encode() if body else None,
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def complete(router: RouterProcess, tokens: list[int] = PROMPT) -> tuple[int, Any]:
    body = {"prompt": tokens, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return ask(router, "/v1/completions", body)


def until(what: Callable[[], Any], why: str) -> Any:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if result := what():
            return result
        time.sleep(0.05)
    raise AssertionError(why)


def peer(router: RouterProcess, decode: str, prefill: str) -> dict[str, Any] | None:
    """What the decode engine says of its session with the prefill engine, once that is decided."""
    for engine in ask(router, "/tandem/engines")[1]["engines"]:
        for known in engine["peers"]:
            if engine["engine_id"] == decode and known["engine_id"] == prefill and known["state"] != "connecting":
                return dict(known)
    return None


@pytest.mark.parametrize(
    ("field", "stranger"),
    [("fingerprint", {}), ("kv_dtype", {"dtype": "bfloat16"}), ("connector", {"connector": "nixl"})],
)
def test_a_pair_that_does_not_fit_is_refused_and_not_used(
    family: ChildProcesses, model: Path, other: Path, field: str, stranger: dict[str, Any]
) -> None:
    odd = config("prefill", other if field == "fingerprint" else model, **stranger)
    router, engines = start(family, ("fits", config("prefill", model)), ("odd", odd), ("sink", config("decode", model)))
    refused = until(lambda: peer(router, "sink", "odd"), "the odd pairing was never decided")
    until(lambda: peer(router, "sink", "fits"), "the other pairing was never decided")
    assert refused["state"] == "refused"
    assert refused["error"].startswith(f"{field} differs: ours is ")
    for _ in range(4):
        status, answer = complete(router)
        assert status == 200
        assert answer["tandem"]["prefill_engine"] == "fits"
        assert answer["choices"][0]["token_ids"] == greedy(model, PROMPT, 6)
    engines["fits"].ranks[0].process.kill()
    until(lambda: complete(router)[0] == 503, "the router still finds a path")
    _, answer = complete(router)
    assert "sink cannot read from odd" in answer["error"]["message"]
    assert f"{field} differs" in answer["error"]["message"]
    assert ask(router, "/health")[0] == 503


def test_a_prefill_engine_that_dies_is_done_without(family: ChildProcesses, model: Path) -> None:
    """Its KV is gone; the decode engine computes the prompt itself, with the same tokens."""
    router, engines = start(family, ("source", config("prefill", model)), ("sink", config("decode", model)))
    until(lambda: peer(router, "sink", "source"), "no handshake")
    assert complete(router)[0] == 200
    engines["source"].ranks[0].process.kill()
    fresh = [token + 1 for token in PROMPT]
    status, answer = complete(router, fresh)
    assert status == 200
    assert answer["choices"][0]["token_ids"] == greedy(model, fresh, 6)
    assert not answer["tandem"]["disaggregated"]
    assert answer["tandem"]["reason"]

    def alone() -> bool:
        return str(complete(router)[1]["tandem"]["reason"]) == "no prefill engine is ready"

    until(alone, "the router still counts on an engine that is gone")


@pytest.mark.parametrize("policy", ["retry", "fail"])
def test_lost_kv_is_retried_elsewhere_or_fails_as_configured(
    family: ChildProcesses, model: Path, policy: KvFailure
) -> None:
    router, engines = start(
        family,
        ("first", config("prefill", model)),
        ("second", config("prefill", model)),
        ("sink", config("decode", model, kv_failure=policy)),
    )
    for name in ("first", "second"):
        until(partial(peer, router, "sink", name), "no handshake")
    first = engines["first"].ranks[0].process
    assert first.pid is not None
    os.kill(first.pid, signal.SIGSTOP)  # a broken connection would be noticed before the next request
    answers = [complete(router, [token + shift for token in PROMPT]) for shift in range(3)]
    first.kill()
    for shift, (status, answer) in enumerate(answers):
        tokens = [token + shift for token in PROMPT]
        if status == 200:
            assert answer["choices"][0]["token_ids"] == greedy(model, tokens, 6)
            assert answer["tandem"]["prefill_engine"] == "second"
        else:
            assert policy == "fail"
            assert answer["error"]["code"] == "kv_lost"
    assert {status for status, _ in answers} == ({200} if policy == "retry" else {200, 500})


def test_a_prefill_engine_that_comes_back_under_its_name_is_used_again(family: ChildProcesses, model: Path) -> None:
    router, engines = start(family, ("source", config("prefill", model)), ("sink", config("decode", model)))
    until(lambda: peer(router, "sink", "source"), "no handshake")
    first = ask(router, "/tandem/engines")[1]["engines"]
    dead = engines["source"].ranks[0]
    dead.process.kill()
    dead.process.join()
    family.children.remove(dead)
    wait_ready(family, [start_engine(family, "source", *config("prefill", model), router)], SECONDS)
    until(lambda: complete(router, [9, *PROMPT])[1].get("tandem", {}).get("disaggregated"), "it is not used again")
    second = ask(router, "/tandem/engines")[1]["engines"]
    lives = [{e["engine_id"]: e["incarnation"] for e in engines_then} for engines_then in (first, second)]
    assert lives[0]["source"] != lives[1]["source"]
    assert lives[0]["sink"] == lives[1]["sink"]

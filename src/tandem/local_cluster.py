"""Engines and router on this machine, as children of one command."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tandem.api.http_server import bind
from tandem.config import EngineConfig, RouterConfig
from tandem.engine.start.launch import EngineProcesses, control_port, published_host
from tandem.errors import StartError
from tandem.processes import Child, ChildProcesses
from tandem.router.process import FrontendConfig, run_frontend
from tandem.wire.messages import Address, EngineStatus


@dataclass(frozen=True, slots=True)
class Progress:
    """What a person may want to see while things start. `loaded`: engine, bytes of weights so far and in all."""

    loaded: Callable[[str, int, int], None] = lambda *_: None
    ready: Callable[[str, EngineStatus], None] = lambda *_: None


@dataclass(frozen=True, slots=True)
class RouterProcess:
    """A router child: where clients and where engines reach it."""

    child: Child
    http: Address
    control: Address


def start_router(family: ChildProcesses, config: RouterConfig, seconds: float) -> RouterProcess:
    """Bind the HTTP port here, so that a port in use is known at once, and start the router on it."""
    listener = bind(config.host, config.port)
    host, port = listener.getsockname()[:2]
    frontend = FrontendConfig(
        kind="router",
        who="router",
        control_host=config.control_host,
        control_port=config.control_port,
        cluster_key_file=config.cluster_key_file,
        api_key=config.api_key,
        request_timeout=config.request_timeout,
        seed=config.seed,
        log_level=config.log_level,
    )
    child = family.start("router", run_frontend, frontend, listener)
    listener.close()
    control = control_port(family, child, seconds)
    return RouterProcess(child, Address(host, port), Address(config.control_host, control))


def start_engines(
    family: ChildProcesses, configs: Sequence[tuple[str, EngineConfig]], router: Address | None
) -> list[EngineProcesses]:
    """All processes of these engines on this node. Their APIs first: those need no torch."""
    engines = [EngineProcesses(config, name, published_host(config)) for name, config in configs]
    for engine in engines:
        engine.start_api(family)
    for engine in engines:
        engine.start_ranks(family, router)
    return engines


def wait_ready(family: ChildProcesses, engines: Sequence[EngineProcesses], seconds: float, progress: Progress) -> None:
    """Until the leaders among these engines can serve, and the other ranks follow theirs. Raises StartError."""
    waiting = {child.name: engine.name for engine in engines for child in engine.ranks}
    children = [child for engine in engines for child in engine.ranks]
    deadline = time.monotonic() + seconds
    while waiting:
        if not family.wait(children, deadline - time.monotonic()):
            names = ", ".join(dict.fromkeys(waiting.values()))
            raise StartError(
                f"{names} did not start within {seconds:.0f} s; raise --start-timeout or see the log above"
            )
        for engine in engines:
            for child in engine.ranks:
                while child.reports:
                    word, value = child.reports.popleft()
                    if word in ("ready", "following"):
                        waiting.pop(child.name, None)
                    _show(engine, word, value, progress)


def _show(engine: EngineProcesses, word: str, value: Any, progress: Progress) -> None:
    if word == "progress":
        progress.loaded(engine.name, *value)
    elif word == "ready":
        progress.ready(engine.name, value)


def wait_healthy(family: ChildProcesses, router: RouterProcess, seconds: float) -> None:
    """Until the router has a whole path for a request. Raises StartError."""
    deadline = time.monotonic() + seconds
    while family.wait([router.child], deadline - time.monotonic()):
        reports = list(router.child.reports)
        router.child.reports.clear()
        if any(word == "health" and value["ok"] for word, value in reports):
            return
    raise StartError(f"the router found no path from prefill to decode within {seconds:.0f} s")

"""Starts engines and routers on this machine, as children of one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tandem.api.http_server import bind
from tandem.config import ClusterConfig, EngineConfig, RouterConfig
from tandem.console import Console
from tandem.engine.start.launch import EngineProcesses, control_port, published_host
from tandem.errors import StartError
from tandem.model_folder import ModelFolder
from tandem.processes import Child, ChildProcesses
from tandem.router.process import run_frontend
from tandem.transfer.transports.registry import connector_name
from tandem.wire.messages import Address


@dataclass(frozen=True, slots=True)
class RouterProcess:
    """A router child: where clients and where engines reach it."""

    child: Child
    http: Address
    control: Address


def start_cluster(family: ChildProcesses, config: ClusterConfig, model: ModelFolder, console: Console) -> RouterProcess:
    """Start a router and its engines; returns once a request would be answered."""
    connector_name(config.connector)  # one that does not exist is an error before anything starts
    seconds = config.time.start_timeout
    router = start_router(family, config.router_config())
    engines = start_engines(family, config.engine_configs(), model, router.control)
    wait_ready(family, engines, seconds, console)
    wait_healthy(family, router, seconds)
    return router


def start_router(family: ChildProcesses, config: RouterConfig) -> RouterProcess:
    """Bind the HTTP port here, so that a port in use is known at once, and start the router on it."""
    listener = bind(config.host, config.port)
    host, port = listener.getsockname()[:2]
    child = family.start("router", run_frontend, "router", "router", config, listener)
    listener.close()
    control = control_port(family, child, config.time.start_timeout)
    return RouterProcess(child, Address(host, port), Address(config.control_host or config.host, control))


def start_engines(
    family: ChildProcesses, configs: Sequence[EngineConfig], model: ModelFolder, router: Address | None
) -> list[EngineProcesses]:
    """Start all processes of these engines on this node. Their APIs first: those need no torch."""
    engines = [EngineProcesses(config, model, published_host(config)) for config in configs]
    for engine in engines:
        engine.start_api(family)
    for engine in engines:
        engine.start_ranks(family, router)
    return engines


def wait_ready(family: ChildProcesses, engines: Sequence[EngineProcesses], seconds: float, console: Console) -> None:
    """Wait until the leaders of these engines can serve, and the other ranks follow theirs. Raises StartError."""
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
                    _show(engine, word, value, console)


def _show(engine: EngineProcesses, word: str, value: Any, console: Console) -> None:
    if word == "progress":
        console.loaded(engine.name, *value)
    elif word == "ready":
        console.ready(engine.name, value, engine.http)


def wait_healthy(family: ChildProcesses, router: RouterProcess, seconds: float) -> None:
    """Wait until the router has a route for a request. Raises StartError."""
    deadline = time.monotonic() + seconds
    while family.wait([router.child], deadline - time.monotonic()):
        reports = list(router.child.reports)
        router.child.reports.clear()
        if any(word == "health" and value["ok"] for word, value in reports):
            return
    raise StartError(f"the router found no path from prefill to decode within {seconds:.0f} s")

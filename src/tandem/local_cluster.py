"""Starts engines and routers on this machine, as children of one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.api.http_server import bind
from tandem.config import ClusterConfig, EngineConfig, RouterConfig
from tandem.console import Console
from tandem.engine.start.launch import EngineProcesses, control_port, published_host
from tandem.errors import StartError
from tandem.model_folder import ModelFolder
from tandem.processes import Child, ChildProcesses
from tandem.reports import Following, Health, Loading, Ready
from tandem.router.process import run_frontend
from tandem.transfer.transports.registry import connector_name
from tandem.wire.messages import Address


@dataclass(frozen=True, slots=True)
class RouterProcess:
    """A router child: `http` is its address for clients, `control` that for engines."""

    child: Child
    http: Address
    control: Address


def start_cluster(
    processes: ChildProcesses, config: ClusterConfig, model: ModelFolder, console: Console
) -> RouterProcess:
    """Start a router and its engines; returns once a request would be answered."""
    connector_name(config.connector)  # one that does not exist is an error before anything starts
    seconds = config.time.start_timeout
    router = start_router(processes, config.router_config())
    engines = start_engines(processes, config.engine_configs(), model, router.control)
    wait_ready(processes, engines, seconds, console)
    wait_healthy(processes, router, seconds)
    return router


def start_router(processes: ChildProcesses, config: RouterConfig) -> RouterProcess:
    """Bind the HTTP port here, so that a port in use is known at once, and start the router on it."""
    listener = bind(config.host, config.port)
    host, port = listener.getsockname()[:2]
    child = processes.start("router", run_frontend, "router", "router", config, listener)
    listener.close()
    control = control_port(processes, child, config.time.start_timeout)
    return RouterProcess(child, Address(host, port), Address(config.control_host or config.host, control))


def start_engines(
    processes: ChildProcesses, configs: Sequence[EngineConfig], model: ModelFolder, router: Address | None
) -> list[EngineProcesses]:
    """Start all processes of these engines on this node. Their APIs first: those need no torch."""
    engines = [EngineProcesses(config, model, published_host(config)) for config in configs]
    for engine in engines:
        engine.start_api(processes)
    for engine in engines:
        engine.start_ranks(processes, router)
    return engines


def wait_ready(processes: ChildProcesses, engines: Sequence[EngineProcesses], seconds: float, console: Console) -> None:
    """Wait until the leaders among these engines can serve and the other ranks follow theirs. Raises StartError."""
    engine_of = {child.name: engine for engine in engines for child in engine.ranks}
    ranks = [child for engine in engines for child in engine.ranks]
    waiting = {child.name: engine.name for engine in engines for child in engine.ranks}
    deadline = time.monotonic() + seconds
    while waiting:
        received = processes.next_report(ranks, deadline - time.monotonic())
        if received is None:
            names = ", ".join(dict.fromkeys(waiting.values()))
            raise StartError(
                f"{names} did not start within {seconds:.0f} s; raise --start-timeout or see the log above"
            )
        child, report = received
        engine = engine_of[child.name]
        match report:
            case Loading(loaded=loaded, total=total):
                console.loaded(engine.name, loaded, total)
            case Ready(status=status):
                console.ready(engine.name, status, engine.url)
                waiting.pop(child.name, None)
            case Following():
                waiting.pop(child.name, None)


def wait_healthy(processes: ChildProcesses, router: RouterProcess, seconds: float) -> None:
    """Wait until the router has a route for a request. Raises StartError."""
    deadline = time.monotonic() + seconds
    while (received := processes.next_report([router.child], deadline - time.monotonic())) is not None:
        if received[1] == Health(ok=True):
            return
    raise StartError(f"the router found no path from prefill to decode within {seconds:.0f} s")

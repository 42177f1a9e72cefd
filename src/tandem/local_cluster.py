"""Engines and router on this machine, as children of one command."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tandem.api.http_server import bind
from tandem.config import EngineConfig, RouterConfig
from tandem.engine.start.launch import EngineProcesses, control_port, published_host
from tandem.errors import StartError
from tandem.processes import Child, ChildProcesses
from tandem.reports import Following, Health, Loading, Ready
from tandem.router.process import FrontendConfig, run_frontend
from tandem.wire.messages import Address, EngineStatus


@dataclass(frozen=True, slots=True)
class Progress:
    """Shows a person how the start goes.

    Attributes:
        loaded: called with an engine's name, the bytes of weights loaded so far and those in all.
        ready: called with an engine's name once it can serve.
    """

    loaded: Callable[[str, int, int], None] = lambda *_: None
    ready: Callable[[str, EngineStatus], None] = lambda *_: None


@dataclass(frozen=True, slots=True)
class RouterProcess:
    """A router child: `http` is its address for clients, `control` that for engines."""

    child: Child
    http: Address
    control: Address


def start_router(processes: ChildProcesses, config: RouterConfig, seconds: float) -> RouterProcess:
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
    child = processes.start("router", run_frontend, frontend, listener)
    listener.close()
    control = control_port(processes, child, seconds)
    return RouterProcess(child, Address(host, port), Address(config.control_host, control))


def start_engines(
    processes: ChildProcesses, configs: Sequence[tuple[str, EngineConfig]], router: Address | None
) -> list[EngineProcesses]:
    """Start all processes of these engines on this node. Their APIs come first: those need no torch."""
    engines = [EngineProcesses(config, name, published_host(config)) for name, config in configs]
    for engine in engines:
        engine.start_api(processes)
    for engine in engines:
        engine.start_ranks(processes, router)
    return engines


def wait_ready(
    processes: ChildProcesses, engines: Sequence[EngineProcesses], seconds: float, progress: Progress
) -> None:
    """Wait until the leaders among these engines can serve and the other ranks follow theirs. Raises StartError."""
    engine_of = {child.name: engine.name for engine in engines for child in engine.ranks}
    ranks = [child for engine in engines for child in engine.ranks]
    waiting = dict(engine_of)
    deadline = time.monotonic() + seconds
    while waiting:
        received = processes.next_report(ranks, deadline - time.monotonic())
        if received is None:
            names = ", ".join(dict.fromkeys(waiting.values()))
            raise StartError(
                f"{names} did not start within {seconds:.0f} s; raise --start-timeout or see the log above"
            )
        child, report = received
        match report:
            case Loading(loaded=loaded, total=total):
                progress.loaded(engine_of[child.name], loaded, total)
            case Ready(status=status):
                progress.ready(engine_of[child.name], status)
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

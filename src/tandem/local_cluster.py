"""Starts engines and routers on this machine, as children of one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tandem.api.http_server import bind
from tandem.config import ClusterConfig, EngineConfig, RouterConfig
from tandem.console import Console
from tandem.engine.start.launch import EngineProcesses
from tandem.errors import StartError
from tandem.model_folder import ModelFolder
from tandem.processes import Child, ChildProcesses
from tandem.reports import ControlPort, Health, Report
from tandem.router.process import run_frontend
from tandem.transfer.transports.registry import connector_name
from tandem.wire.keys import ClusterKey, load_key, new_key
from tandem.wire.messages import Address


class RouterProcess:
    """A router child, which may be started again once it is gone.

    It keeps both its ports over that. Until `close` this object listens for clients too, who wait for the next life of
    the router.

    Attributes:
        http: its address for clients.
    """

    name = "router"

    def __init__(self, processes: ChildProcesses, config: RouterConfig, key: ClusterKey | None) -> None:
        self._processes = processes
        self._config = config
        self._key = key
        self._listener = bind(config.host, config.port)  # here, so that a port in use is known at once
        host, port = self._listener.getsockname()[:2]
        self.http = Address(host, port)
        self.children: list[Child] = []
        self.witnesses: list[Child] = []
        self.is_up = False

    @property
    def child(self) -> Child:
        return self.children[0]

    @property
    def control(self) -> Address:
        """Its address for engines, once it is up."""
        return Address(self._config.control_host or self._config.host, self._config.control_port)

    def start(self) -> None:
        self.is_up = False
        config = self._config
        child = self._processes.start(self.name, run_frontend, "router", self.name, config, self._listener, self._key)
        self.children = [child]

    def take(self, child: Child, report: Report) -> None:
        if isinstance(report, ControlPort):
            self._config = replace(self._config, control_port=report.port)
            self.is_up = True

    def close(self) -> None:
        """Listen no more: when the router has died, clients are refused."""
        self._listener.close()


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """A router and the engines behind it."""

    router: RouterProcess
    engines: list[EngineProcesses]

    def close_listeners(self) -> None:
        """Let clients be refused: nothing that has died is going to be started anew."""
        self.router.close()
        for engine in self.engines:
            engine.close()


def start_cluster(
    processes: ChildProcesses, config: ClusterConfig, model: ModelFolder, console: Console
) -> LocalCluster:
    """Start a router and its engines; returns once a request would be answered.

    Without a cluster key they get one that nobody else knows: no other user of this machine is to pass for one of them.
    """
    connector_name(config.connector)  # one that does not exist is an error before anything starts
    key = load_key(config.access.cluster_key_file) or new_key()
    seconds = config.time.start_timeout
    router = start_router(processes, config.router_config(), key)
    engines = start_engines(processes, config.engine_configs(), model, [router.control], key, console)
    wait_ready(processes, engines, seconds)
    wait_healthy(processes, router, seconds)
    return LocalCluster(router, engines)


def start_router(processes: ChildProcesses, config: RouterConfig, key: ClusterKey | None) -> RouterProcess:
    """Start a router; returns once engines can register. Raises StartError."""
    router = RouterProcess(processes, config, key)
    router.start()
    seconds = config.time.start_timeout
    deadline = time.monotonic() + seconds
    while not router.is_up:
        received = processes.next_report(router.children, deadline - time.monotonic())
        if received is None:
            raise StartError(f"the router did not start within {seconds:.0f} s")
        router.take(*received)
    return router


def start_engines(
    processes: ChildProcesses,
    configs: Sequence[EngineConfig],
    model: ModelFolder,
    routers: Sequence[Address],
    key: ClusterKey | None,
    console: Console,
) -> list[EngineProcesses]:
    """Start these engines' processes on this node; `wait_ready` sees them through."""
    engines = [EngineProcesses(processes, config, model, routers, key, console) for config in configs]
    for engine in engines:
        engine.start()
    return engines


def wait_ready(processes: ChildProcesses, engines: Sequence[EngineProcesses], seconds: float) -> None:
    """Wait until the leaders among these engines can serve and the other ranks follow theirs. Raises StartError."""
    deadline = time.monotonic() + seconds
    while waiting := [engine for engine in engines if not engine.is_up]:
        engine_of = {child.name: engine for engine in engines for child in engine.children}
        children = [child for engine in engines for child in engine.children]
        received = processes.next_report(children, deadline - time.monotonic())
        if received is None:
            names = ", ".join(engine.name for engine in waiting)
            raise StartError(
                f"{names} did not start within {seconds:.0f} s; raise --start-timeout or see the log above"
            )
        child, report = received
        engine_of[child.name].take(child, report)


def wait_healthy(processes: ChildProcesses, router: RouterProcess, seconds: float) -> None:
    """Wait until the router has a whole route for a request. Raises StartError."""
    deadline = time.monotonic() + seconds
    while (received := processes.next_report([router.child], deadline - time.monotonic())) is not None:
        if received[1] == Health(ok=True, whole=True):
            return
    raise StartError(f"the router found no path from prefill to decode within {seconds:.0f} s")

"""Starts the processes of one engine on this node and says when it is ready."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tandem.api.http_server import bind
from tandem.config import LOOPBACK, EngineConfig, RouterConfig
from tandem.engine.start.place import RankPlace
from tandem.errors import ConfigError, StartError
from tandem.model_folder import ModelFolder
from tandem.processes import Child, ChildProcesses
from tandem.router.process import run_frontend
from tandem.wire.addresses import is_loopback, local_address_towards, own_addresses, resolve
from tandem.wire.messages import Address


def published_host(config: EngineConfig) -> str:
    """The address under which others reach this node: as configured, else found from the route to the others.

    Raises ConfigError, saying what to set, where it would be one that they cannot reach.
    """
    parallel, network = config.parallel, config.network
    if network.host is not None:
        host = str(resolve(network.host))
        if parallel.nnodes > 1 and is_loopback(host):
            raise ConfigError(
                f"--host {network.host} is {host} here, which other nodes cannot reach; set --host to this node's"
                f" address in the cluster{_candidates()}"
            )
        return host
    if parallel.nnodes > 1:
        assert parallel.master is not None
        return _towards_master(parallel.master, parallel.node_rank)
    if network.router is not None:
        return local_address_towards(network.router.host, network.router.port)
    return LOOPBACK


def _towards_master(master: Address, node_rank: int) -> str:
    host = str(resolve(master.host))
    if not is_loopback(host):
        return local_address_towards(host, master.port)
    if node_rank != 0:
        raise ConfigError(
            f"--master {master} is {host} on this node, which is this node itself; set --master to node 0's address"
        )
    found = [address for address in own_addresses() if not is_loopback(address)]
    if len(found) == 1:
        return found[0]
    raise ConfigError(
        f"--master {master} is {host} here, which other nodes cannot reach; set --host to this node's address in the"
        f" cluster{_candidates()}"
    )


def _candidates() -> str:
    found = [address for address in own_addresses() if not is_loopback(address)]
    return f" (it has {', '.join(found)})" if found else ""


@dataclass(slots=True)
class EngineProcesses:
    """The children of one engine on this node; the first one is its API on node 0."""

    config: EngineConfig
    model: ModelFolder
    host: str
    http: Address | None = None
    api: Child | None = None
    ranks: list[Child] = field(default_factory=list)
    folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def leader(self) -> Child | None:
        return self.ranks[0] if self.ranks and self.config.parallel.node_rank == 0 else None

    def start_api(self, family: ChildProcesses) -> None:
        """On node 0; binds the HTTP port, so that a port in use is known at once."""
        if self.config.parallel.node_rank != 0:
            return
        config, network = self.config, self.config.network
        api = RouterConfig(network.host or self.host, network.port, LOOPBACK, 0, config.access, config.time, config.run)
        listener = bind(api.host, api.port)
        host, port = listener.getsockname()[:2]
        self.http = Address(host, port)
        name = f"{self.name} api"
        self.api = family.start(name, run_frontend, "engine", name, api, listener)
        listener.close()

    def start_ranks(self, family: ChildProcesses, router: Address | None) -> None:
        """Once the API's control port is known."""
        frontends = [address for address in (router, self._own_control(family)) if address is not None]
        parallel = self.config.parallel
        if parallel.nnodes == 1 and parallel.world_size > 1:
            self.folder = tempfile.TemporaryDirectory(prefix="tandem-")
        meeting = os.path.join(self.folder.name, "meeting") if self.folder else None
        for local_rank, rank in enumerate(parallel.local_ranks):
            place = RankPlace(rank, local_rank, self.host, meeting, tuple(frontends), self.http, self.model)
            child = family.start(f"{self.name} rank {rank}", rank_main, self.config, place)
            self.ranks.append(child)

    def _own_control(self, family: ChildProcesses) -> Address | None:
        if self.api is None:
            return None
        return Address(LOOPBACK, control_port(family, self.api, self.config.time.start_timeout))


def control_port(family: ChildProcesses, frontend: Child, seconds: float) -> int:
    """Where a frontend process listens for engines; waits until it says so."""
    while True:
        for word, value in frontend.reports:
            if word == "control":
                return int(value)
        frontend.reports.clear()
        if not family.wait([frontend], seconds):
            raise StartError(f"{frontend.name} did not start within {seconds:.0f} s")


def rank_main(report: Callable[..., None], config: EngineConfig, place: RankPlace) -> None:
    """First frame of a rank's process."""
    from tandem import logs
    from tandem.engine import commands
    from tandem.engine.start.rank_process import run_rank

    ranks = config.parallel.world_size
    logs.set_up(config.name if ranks == 1 else f"{config.name} rank {place.rank}", config.run.log_level)
    stop: list[Any] = []

    def on_term(*_: object) -> None:
        if stop:
            stop[0].put(commands.Shutdown("it was told to stop"))
        elif place.rank == 0 or not started.is_set() or config.parallel.node_rank != 0:
            os._exit(143)

    def end(text: str) -> None:
        report("error", text)
        os._exit(1)

    def following() -> None:
        started.set()
        report("following")

    started = threading.Event()
    signal.signal(signal.SIGTERM, on_term)
    reason = run_rank(
        config,
        place,
        on_progress=lambda done, total: report("progress", (done, total)),
        on_ready=lambda status: report("ready", status),
        on_mailbox=stop.append,
        on_following=following,
        end_process=end,
    )
    if place.rank != 0:
        report("ended", f"the engine was ended on node 0: {reason}")

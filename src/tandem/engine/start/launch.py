"""Starts the processes of one engine on this node."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass, field

from tandem.api.http_server import bind
from tandem.config import EngineConfig, RouterConfig
from tandem.config_access import LOOPBACK
from tandem.engine.start.placement import RankPlacement
from tandem.errors import ConfigError, StartError
from tandem.model_folder import ModelFolder
from tandem.processes import Child, ChildProcesses
from tandem.reports import ControlPort, Reporter
from tandem.router.process import run_frontend
from tandem.wire.addresses import is_loopback, local_address_towards, own_addresses, resolve
from tandem.wire.messages import Address


def published_host(config: EngineConfig) -> str:
    """Return the address under which others reach this node: as configured, else by the route to the others.

    Raises ConfigError that says what to set where the others could not reach it.
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
    if parallel.nnodes > 1 and parallel.master is not None:
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
    if len(found := _reachable_addresses()) == 1:
        return found[0]
    raise ConfigError(
        f"--master {master} is {host} here, which other nodes cannot reach; set --host to this node's address in the"
        f" cluster{_candidates()}"
    )


def _candidates() -> str:
    found = _reachable_addresses()
    return f" (it has {', '.join(found)})" if found else ""


def _reachable_addresses() -> list[str]:
    return [address for address in own_addresses() if not is_loopback(address)]


def api_host(config: EngineConfig, host: str) -> str:
    """Return where the engine's own API listens: as configured, else on `host` if clients need a key, else loopback."""
    if config.network.api_host is not None:
        return config.network.api_host
    return (config.network.host or host) if config.http.has_key else LOOPBACK


@dataclass(slots=True)
class EngineProcesses:
    """The processes of one engine on this node: its ranks and, on node 0, its API."""

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
    def url(self) -> str | None:
        """Of the engine's own API, if it is on this node."""
        return f"{self.config.http.scheme}://{self.http}" if self.http else None

    @property
    def leader(self) -> Child | None:
        return self.ranks[0] if self.ranks and self.config.parallel.node_rank == 0 else None

    def start_api(self, processes: ChildProcesses) -> None:
        """Start the API on node 0. The HTTP port is bound here, so that a port in use is known at once."""
        if self.config.parallel.node_rank != 0:
            return
        config = self.config
        api = RouterConfig(
            host=api_host(config, self.host),
            port=config.network.port,
            control_host=LOOPBACK,
            control_port=0,
            access=config.access,
            http=config.http,
            limits=config.limits,
            time=config.time,
            run=config.run,
        )
        listener = bind(api.host, api.port)
        host, port = listener.getsockname()[:2]
        self.http = Address(host, port)
        name = f"{self.name} api"
        self.api = processes.start(name, run_frontend, "engine", name, api, listener)
        listener.close()

    def start_ranks(self, processes: ChildProcesses, router: Address | None) -> None:
        """Start the ranks, once the API's control port is known."""
        own_api = self._own_control(processes)
        frontends = tuple(address for address in (router, own_api) if address is not None)
        meeting = self._meeting()
        for local_rank, rank in enumerate(self.config.parallel.local_ranks):
            placement = RankPlacement(rank, local_rank, self.host, meeting, frontends, self.http, self.model)
            child = processes.start(f"{self.name} rank {rank}", rank_main, self.config, placement)
            self.ranks.append(child)

    def _own_control(self, processes: ChildProcesses) -> Address | None:
        if self.api is None:
            return None
        return Address(LOOPBACK, control_port(processes, self.api, self.config.time.start_timeout))

    def _meeting(self) -> Address | str | None:
        parallel = self.config.parallel
        if parallel.world_size == 1:
            return None
        if parallel.nnodes > 1:
            return parallel.master
        self.folder = tempfile.TemporaryDirectory(prefix="tandem-")
        return os.path.join(self.folder.name, "meeting")


def control_port(processes: ChildProcesses, frontend: Child, seconds: float) -> int:
    """Wait until a frontend process reports where it listens for engines; return the port. Raises StartError."""
    deadline = time.monotonic() + seconds
    while (received := processes.next_report([frontend], deadline - time.monotonic())) is not None:
        if isinstance(received[1], ControlPort):
            return received[1].port
    raise StartError(f"{frontend.name} did not start within {seconds:.0f} s")


def rank_main(report: Reporter, config: EngineConfig, placement: RankPlacement) -> None:
    """Run a rank's process. What needs torch is imported here, so that it is imported by the child alone."""
    from tandem.engine.start.rank_process import run_rank

    run_rank(report, config, placement)

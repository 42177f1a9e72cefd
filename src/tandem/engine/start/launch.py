"""Starts the processes of one engine on this node."""

from __future__ import annotations

import socket
import uuid
from collections.abc import Sequence

from tandem.api.http_server import bind
from tandem.config import EngineConfig, RouterConfig
from tandem.config_access import LOOPBACK
from tandem.console import Console
from tandem.engine.start.placement import RankPlacement
from tandem.errors import ConfigError
from tandem.model_folder import ModelFolder
from tandem.processes import Child, ChildProcesses
from tandem.reports import ControlPort, Following, Loading, Ready, Report, Reporter
from tandem.router.process import run_frontend
from tandem.runtime_folder import runtime_folder
from tandem.wire.addresses import is_loopback, local_address_towards, own_addresses, resolve
from tandem.wire.keys import ClusterKey
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
    if network.router:
        return local_address_towards(network.router[0].host, network.router[0].port)
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


class EngineProcesses:
    """The processes of one engine on this node: its ranks and, on node 0, its API.

    They live and die together, and may be started again once all are gone. The API keeps its port over that, as this
    object keeps listening on it: until `close`, clients wait for the next life of the engine.

    Args:
        routers: where to register, beside the engine's own API.
        key: the cluster key.
    """

    def __init__(
        self,
        processes: ChildProcesses,
        config: EngineConfig,
        model: ModelFolder,
        routers: Sequence[Address],
        key: ClusterKey | None,
        console: Console,
    ) -> None:
        self.config = config
        self.http: Address | None = None
        self.api: Child | None = None
        self.ranks: list[Child] = []
        self._processes = processes
        self._model = model
        self._host = published_host(config)
        self._routers = tuple(routers)
        self._key = key
        self._console = console
        self._listener = self._bind() if config.parallel.node_rank == 0 else None
        self._starting: set[str] = set()

    def _bind(self) -> socket.socket:
        """Bind the API's port here, so that a port in use is known at once."""
        listener = bind(api_host(self.config, self._host), self.config.network.port)
        host, port = listener.getsockname()[:2]
        self.http = Address(host, port)
        return listener

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

    @property
    def children(self) -> list[Child]:
        return [*self.ranks, *([self.api] if self.api is not None else [])]

    @property
    def witnesses(self) -> list[Child]:
        """Those who may know why one of them has died."""
        return self.ranks if len(self.ranks) > 1 else []

    @property
    def is_up(self) -> bool:
        """Whether all ranks have told that they are ready."""
        return bool(self.ranks) and not self._starting

    def start(self) -> None:
        """Start the API first, which needs no torch; the ranks follow once its control port is known."""
        self.ranks, self.api = [], None
        self._starting.clear()
        if self._listener is None:
            self._start_ranks(None)
            return
        config = self.config
        api = RouterConfig(
            host=api_host(config, self._host),
            port=config.network.port,
            control_host=LOOPBACK,
            control_port=0,
            access=config.access,
            http=config.http,
            limits=config.limits,
            time=config.time,
            run=config.run,
        )
        name = f"{self.name} api"
        self.api = self._processes.start(name, run_frontend, "engine", name, api, self._listener, self._key)

    def take(self, child: Child, report: Report) -> None:
        """Take a report of one of the children."""
        match report:
            case ControlPort(port=port):
                self._start_ranks(Address(LOOPBACK, port))
            case Loading(loaded=loaded, total=total):
                self._console.loaded(self.name, loaded, total)
            case Ready(status=status):
                self._console.ready(self.name, status, self.url)
                self._starting.discard(child.name)
            case Following():
                self._starting.discard(child.name)

    def close(self) -> None:
        """Listen no more: when the API has died, clients are refused."""
        if self._listener is not None:
            self._listener.close()

    def _start_ranks(self, own_api: Address | None) -> None:
        frontends = (*self._routers, *([own_api] if own_api is not None else []))
        meeting = self._meeting()
        for local_rank, rank in enumerate(self.config.parallel.local_ranks):
            placement = RankPlacement(
                rank, local_rank, self._host, meeting, frontends, self.http, self._model, self._key
            )
            name = f"{self.name} rank {rank}"
            self._starting.add(name)
            self.ranks.append(self._processes.start(name, rank_main, self.config, placement))

    def _meeting(self) -> Address | str | None:
        """Return where the ranks find each other in this life."""
        parallel = self.config.parallel
        if parallel.world_size == 1:
            return None
        if parallel.nnodes > 1:
            return parallel.master
        return str(runtime_folder() / f"meeting-{uuid.uuid4().hex}")


def rank_main(report: Reporter, config: EngineConfig, placement: RankPlacement) -> None:
    """Run a rank's process. What needs torch is imported here, so that it is imported by the child alone."""
    from tandem.engine.start.rank_process import run_rank

    run_rank(report, config, placement)

"""The process behind an HTTP port: the router's, or that of one engine's own API."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from typing import Any, Literal

import uvloop
import zmq
import zmq.asyncio

from tandem import logs
from tandem.api.api_keys import ApiKeys
from tandem.api.app import create_app
from tandem.api.connections import Refusals
from tandem.api.http_server import Tls, serve
from tandem.api.loaded_model import ModelLoader
from tandem.config import RouterConfig
from tandem.config_access import HttpSection
from tandem.errors import RequestError
from tandem.reports import ControlPort, Health, Reporter
from tandem.router.connection_monitor import CONTROL_SOCKET
from tandem.router.engine_connections import EngineConnections
from tandem.router.engine_operator import EngineOperator
from tandem.router.engine_registry import EngineRegistry
from tandem.router.policy import OneModelPolicy, SingleEnginePolicy
from tandem.router.request_router import RequestRouter
from tandem.wire.addresses import is_loopback
from tandem.wire.keys import ClusterKey
from tandem.wire.sockets import Sockets

log = logging.getLogger(__name__)

Kind = Literal["router", "engine"]


def run_frontend(
    report: Reporter,
    kind: Kind,
    name: str,
    config: RouterConfig,
    listener: socket.socket,
    key: ClusterKey | None,
) -> None:
    """Serve until SIGTERM. Reports the `ControlPort` for engines, and its `Health` whenever an engine changes.

    Args:
        name: of the process in log lines.
        listener: bound and listening HTTP socket.
        key: the cluster key, if there is one.
    """
    logs.set_up(name, config.run.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(report, kind, config, listener, key))


async def _serve(
    report: Reporter, kind: Kind, config: RouterConfig, listener: socket.socket, key: ClusterKey | None
) -> None:
    sockets: Sockets[zmq.asyncio.Socket] = Sockets(zmq.asyncio.Context(), key)
    control, port = sockets.bind(zmq.ROUTER, config.control_host or config.host, config.control_port, CONTROL_SOCKET)
    registry = EngineRegistry()
    policy = OneModelPolicy(registry) if kind == "router" else SingleEnginePolicy(registry)
    connections = EngineConnections(control, registry, introduce=kind == "router")
    backend = RequestRouter(
        connections,
        policy,
        request_timeout=config.time.request_timeout,
        route_timeout=config.time.route_timeout,
        seed=config.run.seed,
        kv_aware=kind == "router" and config.routing == "kv-aware",
    )
    loader = ModelLoader(
        backend, config.run.generation_config, config.run.tool_call_parser, config.run.reasoning_parser
    )
    http = config.http
    keys = ApiKeys(http.api_key, http.api_key_file) if http.has_key else None
    warn_if_open(listener, keys)
    refusals = Refusals()
    operator = EngineOperator(connections) if kind == "router" else None
    app = create_app(backend, loader, kind=kind, keys=keys, limits=config.limits, refusals=refusals, operator=operator)
    health = _HealthReporter(report, backend)
    connections.on_change = health.update
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    receiving = asyncio.create_task(connections.run())
    receiving.add_done_callback(lambda _: stop.set())
    loading = asyncio.create_task(_load_early(loader, health.first_engine))
    report(ControlPort(port))
    try:
        await serve(app, listener, stop, grace=1.0, limits=config.limits, tls=_tls(http), refusals=refusals)
    finally:
        loading.cancel()
        receiving.cancel()
        await asyncio.gather(loading, receiving, return_exceptions=True)
        connections.stop()
    for task in (loading, receiving):
        if not task.cancelled():
            task.result()  # raises the error that ended it


def warn_if_open(listener: socket.socket, keys: ApiKeys | None) -> None:
    """Log a warning where whoever reaches this machine may use the API."""
    host, port = listener.getsockname()[:2]
    if keys is None and not is_loopback(host):
        log.warning(
            "the API at %s port %d takes requests of whoever reaches it, as there is no API key: set TANDEM_API_KEY or"
            " --api-key-file, or listen on 127.0.0.1",
            host,
            port,
        )


def _tls(http: HttpSection) -> Tls | None:
    return (http.tls_cert, http.tls_key) if http.tls_cert is not None and http.tls_key is not None else None


async def _load_early(loader: ModelLoader, first_engine: asyncio.Event) -> None:
    """Read tokenizer and template once an engine has told of its model, so that the first request need not wait."""
    await first_engine.wait()
    try:
        await loader.get()
    except RequestError as error:
        log.error("%s; a router needs the model's folder under the same path as its engines", error)


HEALTH_SECONDS = 0.05
"""From a change to the look at the health: a hundred engines that beat cost no more than one."""


class _HealthReporter:
    """Tells the owner of the process when the frontend becomes able to serve, and when it no longer is.

    Attributes:
        first_engine: set once an engine has come.
    """

    def __init__(self, report: Reporter, backend: RequestRouter) -> None:
        self._report = report
        self._backend = backend
        self._last: Any = None
        self._planned = False
        self.first_engine = asyncio.Event()

    def update(self) -> None:
        """Look soon; called at every change."""
        if not self._planned:
            self._planned = True
            asyncio.get_running_loop().call_later(HEALTH_SECONDS, self._look)

    def _look(self) -> None:
        self._planned = False
        health = self._backend.health()
        states = [(engine.engine_id, engine.state.value) for engine in self._backend.engines()]
        if states:
            self.first_engine.set()
        now = (health.ok, health.whole, states)
        if now != self._last:
            self._last = now
            self._report(Health(health.ok, health.whole))

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
from fastapi import FastAPI

from tandem import logs
from tandem.api.app import create_app, preload
from tandem.api.http_server import serve
from tandem.config import RouterConfig
from tandem.errors import RequestError
from tandem.reports import ControlPort, Health, Reporter
from tandem.router.hub import Hub
from tandem.router.registry import EngineRegistry
from tandem.router.router import Router, pair_finder, single_finder
from tandem.wire.keys import load_key
from tandem.wire.sockets import SocketOptions, Sockets

log = logging.getLogger(__name__)

Kind = Literal["router", "engine"]


def run_frontend(report: Reporter, kind: Kind, name: str, config: RouterConfig, listener: socket.socket) -> None:
    """Serve until SIGTERM. Reports the `ControlPort` for engines, and its `Health` whenever an engine changes.

    Args:
        name: of the process in log lines.
        listener: bound and listening HTTP socket.
    """
    logs.set_up(name, config.run.log_level)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(report, kind, config, listener))


async def _serve(report: Reporter, kind: Kind, config: RouterConfig, listener: socket.socket) -> None:
    key = load_key(config.access.cluster_key_file)
    context = zmq.asyncio.Context()
    sockets: Sockets[zmq.asyncio.Socket] = Sockets(context, key)
    control, port = sockets.bind(
        zmq.ROUTER, config.control_host or config.host, config.control_port, SocketOptions(handover=True)
    )
    pool = EngineRegistry()
    hub = Hub(control, pool, introduce=kind == "router")
    find = pair_finder(pool) if kind == "router" else single_finder(pool)
    backend = Router(hub, pool, find, request_timeout=config.time.request_timeout, seed=config.run.seed)
    app = create_app(backend, kind=kind, api_key=config.access.api_key)
    announcer = _Announcer(report, backend)
    hub.on_change = announcer.changed
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    started = asyncio.Event()
    hub_task = asyncio.create_task(hub.run())
    hub_task.add_done_callback(lambda _: stop.set())
    loading = asyncio.create_task(_load_early(app, announcer.first))
    report(ControlPort(port))
    try:
        await serve(app, listener, stop, started=started, grace=1.0)
    finally:
        loading.cancel()
        hub_task.cancel()
        await asyncio.gather(loading, hub_task, return_exceptions=True)
        hub.stop()
    for task in (loading, hub_task):
        if not task.cancelled():
            task.result()  # raises what it died of


async def _load_early(app: FastAPI, known: asyncio.Event) -> None:
    """Read tokenizer and template once an engine has told of its model, so that the first request need not wait."""
    await known.wait()
    try:
        await preload(app)
    except RequestError as error:
        log.error("%s; a router needs the model's folder under the same path as its engines", error)


class _Announcer:
    """Tells the owner of the process when the frontend becomes able to serve, and when it no longer is.

    Attributes:
        first: set once an engine has come.
    """

    def __init__(self, report: Reporter, backend: Router) -> None:
        self._report = report
        self._backend = backend
        self._last: Any = None
        self.first = asyncio.Event()

    def changed(self) -> None:
        health = self._backend.health()
        states = [(status.engine_id, state) for status, state in self._backend.engines()]
        if states:
            self.first.set()
        now = (health.ok, states)
        if now != self._last:
            self._last = now
            self._report(Health(health.ok))

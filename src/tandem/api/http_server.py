"""Run the application on a socket until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from tandem.api.connections import Connections, Refusals
from tandem.api.http_protocol import BoundedProtocol
from tandem.config_limits import LimitsSection
from tandem.errors import ConfigError

GRACE_S = 5.0
KEEP_ALIVE_S = 60
LAST_WORDS_S = 1.0
"""For cancelled requests to say so, and for their clients to read it."""
BACKLOG = 2048

Tls = tuple[Path, Path]
"""PEM files: the certificate (chain), and its private key."""


def bind(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket; port 0 means any free one (`getsockname()` tells). Raises ConfigError."""
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not 0 <= port <= 65535:
        raise ConfigError(f"cannot listen on {where}: ports go from 0 (any free one) to 65535.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {where}: {error}") from error
    try:
        both = family == socket.AF_INET6  # [::] takes IPv4 too
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {where}: {os.strerror(error.errno or 0)}. Choose another port, or stop what uses it."
        ) from error
    listener.setblocking(False)
    return listener


async def serve(
    app: ASGIApp,
    listener: socket.socket,
    stop: asyncio.Event,
    *,
    grace: float = GRACE_S,
    limits: LimitsSection | None = None,
    tls: Tls | None = None,
    refusals: Refusals | None = None,
) -> None:
    """Answer requests on `listener` until `stop` is set, and close it.

    Requests under way then have `grace` seconds to end; later they are cancelled. Signals are left to the caller.
    Raises ConfigError for TLS files that cannot be used.
    """
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=max(1, round(grace)),
        backlog=BACKLOG,
        ssl_certfile=tls[0] if tls else None,
        ssl_keyfile=tls[1] if tls else None,
    )
    try:
        config.load()
    except OSError as error:  # ssl.SSLError is one
        raise ConfigError(f"--tls-cert and --tls-key cannot be used: {error}") from error
    server = _Server(config, limits or LimitsSection(), refusals or Refusals())
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        server.should_exit = True
        await asyncio.wait((serving,))
    finally:
        server.should_exit = True
        stopping.cancel()
        await asyncio.gather(serving, stopping, return_exceptions=True)
        await _cancel_requests(server)
    serving.result()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, limits: LimitsSection, refusals: Refusals) -> None:
        super().__init__(config)
        self._limits = limits
        self._refusals = refusals
        self.open_connections = Connections(limits)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen with connections that have limits, of which uvicorn's own `startup` knows nothing."""
        loop, tls = asyncio.get_running_loop(), self.config.ssl
        self.servers = [
            await loop.create_server(
                self._connection,
                sock=one,
                ssl=tls,
                backlog=BACKLOG,
                ssl_handshake_timeout=self._limits.head_timeout if tls else None,
            )
            for one in sockets or ()
        ]
        self.started = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def _connection(self) -> BoundedProtocol:
        return BoundedProtocol(self.config, self.server_state, self._limits, self.open_connections, self._refusals)


async def _cancel_requests(server: _Server) -> None:
    """Cancel the requests that ran out of grace, and wait until they have said so and given back what they hold."""
    state = server.server_state
    left = list(state.tasks)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=LAST_WORDS_S)
    with suppress(TimeoutError):
        await asyncio.wait_for(server.open_connections.none_open.wait(), LAST_WORDS_S)
    for connection in list(state.connections):
        connection.transport.abort()

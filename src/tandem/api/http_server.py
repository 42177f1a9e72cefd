"""Run the application on a socket until it is told to stop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from tandem.errors import ConfigError

GRACE_S = 5.0
KEEP_ALIVE_S = 60
BACKLOG = 2048


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


async def serve(app: ASGIApp, listener: socket.socket, stop: asyncio.Event, *, grace: float = GRACE_S) -> None:
    """Answer requests on `listener` until `stop` is set, and close it.

    Requests under way then have `grace` seconds to end; later they are cancelled. Signals are left to the caller.
    """
    server = _Server(
        uvicorn.Config(
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
        )
    )
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
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _cancel_requests(server: uvicorn.Server) -> None:
    """Cancel the requests that ran out of grace, and wait until they have given back what they hold."""
    left = list(server.server_state.tasks)
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=1.0)

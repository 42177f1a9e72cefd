"""The transports by name. Each is imported when one is made, so one that is not installed costs nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from tandem.errors import ConfigError
from tandem.transfer.transports.base import Transport, TransportFactory
from tandem.wire.keys import ClusterKey


def _nixl(agent: str, host: str, key: ClusterKey | None) -> Transport:
    # UCX puts every address of this machine into its metadata, so the host is of no use to it.
    from tandem.transfer.transports.nixl.transport import NixlTransport

    return NixlTransport(agent)


def _tcp(agent: str, host: str, key: ClusterKey | None) -> Transport:
    from tandem.transfer.transports.tcp.client import TcpTransport

    return TcpTransport(agent, host, key)


_TRANSPORTS: dict[str, Callable[[str, str, ClusterKey | None], Transport]] = {"nixl": _nixl, "tcp": _tcp}

TRANSPORT_NAMES = tuple(_TRANSPORTS)


def default_transport() -> str:
    """Return `nixl` where it is installed, else `tcp`."""
    return "nixl" if importlib.util.find_spec("nixl") is not None else "tcp"


def transport_factory(name: str, key: ClusterKey | None) -> TransportFactory:
    """Return the factory of the transport of this name.

    Args:
        name: one of TRANSPORT_NAMES.
        key: the cluster key, for transports that open sockets of their own.

    Raises:
        ConfigError: no transport has this name, or it is not installed.
    """
    make = _TRANSPORTS.get(name)
    if make is None:
        raise ConfigError(f"no connector is called {name!r}; there are {', '.join(TRANSPORT_NAMES)}")
    if name == "nixl" and default_transport() != "nixl":
        raise ConfigError("connector nixl is not installed; `pip install nixl`, or use `--connector tcp`")
    return lambda agent, host: make(agent, host, key)


def connector_name(name: str | None) -> str:
    """Return the configured connector, or the default one. Raises ConfigError if there is none of this name."""
    chosen = name or default_transport()
    transport_factory(chosen, None)
    return chosen

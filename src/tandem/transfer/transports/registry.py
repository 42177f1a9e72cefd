"""The transports by name. Each is imported when it is made, so one that is not installed costs nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from tandem.errors import ConfigError
from tandem.transfer.transports.base import Transport, TransportFactory
from tandem.wire.sockets import ClusterKey


def _nixl(agent: str, host: str, key: ClusterKey | None) -> Transport:
    from tandem.transfer.transports.nixl import NixlTransport

    return NixlTransport(agent, host)


def _tcp(agent: str, host: str, key: ClusterKey | None) -> Transport:
    from tandem.transfer.transports.tcp.client import TcpTransport

    return TcpTransport(agent, host, key)


_TRANSPORTS: dict[str, Callable[[str, str, ClusterKey | None], Transport]] = {"nixl": _nixl, "tcp": _tcp}

TRANSPORT_NAMES = tuple(_TRANSPORTS)


def default_transport() -> str:
    """`nixl` where it is installed, else `tcp`."""
    return "nixl" if importlib.util.find_spec("nixl") is not None else "tcp"


def transport_factory(name: str, key: ClusterKey | None) -> TransportFactory:
    """What makes the transport of this name.

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
    """The configured connector, or the default one. Raises ConfigError if there is none of this name."""
    chosen = name or default_transport()
    transport_factory(chosen, None)
    return chosen

"""Count open connections, in all and of each client."""

from __future__ import annotations

import asyncio
import ipaddress
import resource
from collections import Counter

from tandem.config_limits import LimitsSection
from tandem.errors import Overloaded

RESERVED_FILES = 256
"""Open files that are left for all but clients: sockets to engines, the model's files."""


class Refusals:
    """Counts what was refused at the door, by reason: connections, and heads of what never became a request."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()

    def add(self, reason: str) -> None:
        self.count[reason] += 1


class Connections:
    """Connections that are open, and which of them may ask for more than /health and /metrics.

    Attributes:
        most: connections beyond which new ones are closed unread, as there are not more files for them.
        none_open: set while there are none.
    """

    def __init__(self, limits: LimitsSection) -> None:
        self._limits = limits
        self._open = 0
        self.none_open = asyncio.Event()
        self.none_open.set()
        self._admitted: Counter[str] = Counter()
        self.most = raised_file_limit() - RESERVED_FILES
        self._max_admitted = min(limits.max_connections, self.most * 3 // 4)

    def opened(self) -> int:
        """Count a connection; returns how many are open."""
        self._open += 1
        self.none_open.clear()
        return self._open

    def closed(self, client: str | None) -> None:
        """Forget a connection. `client`: as it was admitted, or None."""
        self._open -= 1
        if not self._open:
            self.none_open.set()
        if client is not None:
            self._admitted[client] -= 1
            if not self._admitted[client]:
                del self._admitted[client]

    def admit(self, client: str) -> None:
        """Take a connection for all requests. Raises Overloaded where there are too many."""
        most_of_client = self._limits.max_client_connections
        if self._admitted.total() >= self._max_admitted:
            raise Overloaded(f"{self._max_admitted} connections are open, and --max-connections allows no more")
        if self._admitted[client] >= most_of_client:
            raise Overloaded(f"{client} has {most_of_client} open connections, which is --max-client-connections")
        self._admitted[client] += 1


def client_of(host: str) -> str:
    """Return what counts as one client: an IPv4 address, or the /64 network of an IPv6 one."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def is_local(host: str) -> bool:
    """Tell whether a client is on this machine. `host` may be what a proxy says of it: a name is never resolved."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def raised_file_limit() -> int:
    """Let this process open as many files as it may, and return how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 2**20 if hard == resource.RLIM_INFINITY else max(hard, 2 * RESERVED_FILES)

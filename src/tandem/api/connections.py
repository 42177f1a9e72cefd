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
MAX_OVER = 2
"""So many times --max-connections are looked at at all, so that /health is answered when clients take all of them."""


class Connections:
    """Connections that are open, and which of them may ask for more than /health and /metrics.

    Attributes:
        most: connections beyond which new ones are closed unread.
        none_open: set while there are none.
    """

    def __init__(self, limits: LimitsSection) -> None:
        self._limits = limits
        self._open = 0
        self.none_open = asyncio.Event()
        self.none_open.set()
        self._admitted: Counter[str] = Counter()
        self.most = min(MAX_OVER * limits.max_connections, raised_file_limit() - RESERVED_FILES)

    def opened(self) -> bool:
        """Count a connection; returns False if it must be closed at once."""
        self._open += 1
        self.none_open.clear()
        return self._open <= self.most

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
        limits = self._limits
        if self._admitted.total() >= min(limits.max_connections, self.most):
            raise Overloaded(f"{limits.max_connections} connections are open, which is --max-connections")
        if self._admitted[client] >= limits.max_client_connections:
            raise Overloaded(
                f"{limits.max_client_connections} connections of {client} are open, which is --max-client-connections"
            )
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


def raised_file_limit() -> int:
    """Let this process open as many files as it may, and return how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return 2**20 if hard == resource.RLIM_INFINITY else max(hard, 2 * RESERVED_FILES)

"""Host names and IP addresses: resolution, loopback, and the addresses of this machine."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from tandem.errors import ConfigError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


def resolve(host: str) -> IPAddress:
    """Return the IP address of a host name or address.

    An IPv4 address is preferred, so that two processes that are both given `localhost` meet. The empty name and `*`
    stand for all addresses of this machine. It may ask the name service, and so block.

    Raises:
        ConfigError: the name is not known.
    """
    if host in ("", "*"):
        return ipaddress.IPv4Address("0.0.0.0")
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host name {host!r} cannot be resolved: {error}; check it or give an address") from None
    addresses = [ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found]
    return min(addresses, key=lambda address: address.version)


def is_loopback(host: str) -> bool:
    """Tell whether traffic to this host stays on this machine. False for a name that is not known."""
    try:
        address = resolve(host)
    except ConfigError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def local_address_towards(host: str, port: int) -> str:
    """Return this machine's address on the route to `host`, at which `host` can be expected to reach us.

    Sends nothing: connecting a UDP socket only chooses a route.

    Raises:
        ConfigError: the name is not known, or there is no route.
    """
    address = resolve(host)
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(address), port or 9))
        except OSError as error:
            raise ConfigError(f"no route from this machine to {host}: {error.strerror}") from None
        return str(probe.getsockname()[0])


def endpoint(host: str, port: int) -> str:
    """Return `host:port` as people write it, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has this IP address; None if there is none."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in entries):
            return name
    return None


def own_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine's interfaces, loopback included."""
    interfaces = psutil.net_if_addrs().values()
    return [entry.address for entries in interfaces for entry in entries if entry.family == socket.AF_INET]

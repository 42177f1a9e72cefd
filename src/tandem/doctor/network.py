"""The network of this machine: interfaces, InfiniBand ports, the host name, ports that commands listen on."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.doctor.finding import Finding, ok, problem, warning
from tandem.errors import ConfigError
from tandem.wire.addresses import interface_of, is_loopback, own_addresses, resolve

DEFAULT_PORTS = ((8000, "OpenAI API", "--port"), (7000, "control port", "--control-port"))
SMALL_MTU = 1400
"""Networks laid over others have 1400 to 1450 of Ethernet's 1500; below that something is wrong."""


@dataclass(frozen=True, slots=True)
class Interface:
    """`speed`: Mbit/s; None where the driver does not say."""

    name: str
    address: str
    mtu: int | None
    speed: int | None

    def __str__(self) -> str:
        parts = [self.address]
        if self.mtu is not None:
            parts.append(f"MTU {self.mtu}")
        if self.speed is not None:
            parts.append(f"{self.speed / 1000:g} Gbit/s")
        return f"{self.name} ({', '.join(parts)})"


def check_network(host: str | None) -> list[Finding]:
    """`host`: this node's address as it would be given to the other commands."""
    found = own_interfaces()
    name = socket.gethostname()
    return [
        interfaces(found),
        infiniband(_infiniband_ports()),
        host_name(name, _resolved(name), [interface.address for interface in found]),
        *([given_host(host, [interface.address for interface in found])] if host is not None else []),
        *(port_free(host or "127.0.0.1", port, use, flag) for port, use, flag in DEFAULT_PORTS),
    ]


def interfaces(found: Sequence[Interface]) -> Finding:
    outward = [interface for interface in found if not is_loopback(interface.address)]
    if not outward:
        return warning(
            "network",
            "only loopback",
            "engines on this machine can work together, but no other machine can reach them",
        )
    small = [interface.name for interface in outward if (interface.mtu or SMALL_MTU) < SMALL_MTU]
    text = ", ".join(map(str, outward))
    if small:
        return warning("network", text, f"the MTU of {', '.join(small)} is below {SMALL_MTU}, which costs throughput")
    return ok("network", text)


def infiniband(ports: Sequence[tuple[str, str, str]]) -> Finding:
    """`ports`: device:port, state, rate."""
    if not ports:
        return ok("RDMA devices", "none; between machines KV moves over TCP")
    text = ", ".join(f"{name} {state} {rate}" for name, state, rate in ports)
    if not any("ACTIVE" in state for _, state, _ in ports):
        return warning("RDMA devices", text, "no port is active: check the cable and the subnet manager")
    return ok("RDMA devices", text)


def host_name(name: str, addresses: Sequence[str] | ConfigError, own: Sequence[str]) -> Finding:
    """Whether the machine's own name would do as an address for others."""
    outward = [address for address in own if not is_loopback(address)]
    advice = "give addresses, not this name: " + (
        f"set --host to {' or '.join(outward)} when an engine spans nodes" if outward else "set --host"
    )
    if isinstance(addresses, ConfigError):
        return warning("host name", f"{name} cannot be resolved", advice)
    text = f"{name} is {', '.join(addresses)}"
    if any(is_loopback(address) for address in addresses):
        return warning(
            "host name", f"{text}, which is loopback: others who are told this address reach themselves", advice
        )
    if not set(addresses) & set(own) and all("." in address for address in addresses):
        return warning("host name", f"{text}, which no interface of this machine has", advice)
    return ok("host name", text)


def given_host(host: str, own: Sequence[str]) -> Finding:
    address = str(resolve(host))
    text = host if host == address else f"{host} is {address}"
    if is_loopback(address):
        return warning("--host", f"{text}, loopback", "engines of other machines cannot reach this one under it")
    if address not in own and address != "0.0.0.0" and "." in address:
        return problem("--host", f"{text}, which no interface here has", f"this machine has {', '.join(own)}")
    return ok("--host", text)


def port_free(host: str, port: int, use: str, flag: str) -> Finding:
    what = f"port {port}"
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            return warning(
                what,
                f"not free ({error.strerror})",
                f"a router's {use} would not start on it; choose another with {flag}",
            )
    return ok(what, f"free for a router's {use}")


# --- reading ---------------------------------------------------------------------------------------------------------


def own_interfaces() -> list[Interface]:
    """Those with an IPv4 address."""
    found = []
    for address in own_addresses():
        name = interface_of(address) or "?"
        folder = Path("/sys/class/net") / name
        speed = _number(folder / "speed")
        found.append(Interface(name, address, _number(folder / "mtu"), speed if speed and speed > 0 else None))
    return found


def network_devices() -> set[str]:
    """Names that UCX_NET_DEVICES may hold: interfaces and InfiniBand devices, with and without port."""
    names = {name for _, name in socket.if_nameindex()}
    for name, _, _ in _infiniband_ports():
        names |= {name, name.partition(":")[0]}
    return names


def _infiniband_ports() -> list[tuple[str, str, str]]:
    root = Path("/sys/class/infiniband")
    found = []
    for port in sorted(root.glob("*/ports/*")):
        state = re.sub(r"^\d+:\s*", "", _text(port / "state"))
        found.append((f"{port.parent.parent.name}:{port.name}", state, _text(port / "rate")))
    return found


def _resolved(name: str) -> list[str] | ConfigError:
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return ConfigError(str(error))
    return sorted({str(entry[4][0]).partition("%")[0] for entry in entries})


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # virtual interfaces refuse to tell their speed
        return ""


def ucx_environment() -> dict[str, str]:
    """What is set for UCX by hand."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("UCX_")}

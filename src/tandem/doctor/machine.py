"""This machine: processors, memory, limits, clock, network. Checks are pure; the functions at the end read."""

from __future__ import annotations

import ipaddress
import os
import re
import resource
import shutil
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tandem.doctor.findings import Finding, ok, problem, warning, warning_if
from tandem.wire.addresses import is_loopback, resolve

GIB = 1 << 30
MIN_MEMORY = 2 * GIB
MIN_SHARED_MEMORY = GIB
MIN_FILES = 4096
SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies", "refined-jiffies")
OLDEST_NOW = 1_700_000_000
"""A wall clock before this (November 2023) was never set."""

DEFAULT_PORTS = ((8000, "OpenAI API", "--port"), (7000, "control port", "--control-port"))
SMALL_MTU = 1400
"""Overlay networks have 1400 to 1450 of Ethernet's 1500; below that something is wrong."""


def check_machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    return [
        processors(psutil.cpu_count() or 1, len(psutil.Process().cpu_affinity() or []), _cpu_quota()),
        free_memory(memory.total, memory.available, _memory_limit()),
        shared_memory(shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0),
        open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        locked_memory(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], rdma=bool(infiniband_ports())),
        clock(_read("/sys/devices/system/clocksource/clocksource0/current_clocksource"), time.time()),
    ]


def check_network(host: str | None) -> list[Finding]:
    """`host`: this node's address as it would be given to the other commands."""
    found = network_interfaces()
    name, own = socket.gethostname(), [address for interface in found for address in interface.addresses]
    return [
        interfaces(found),
        infiniband(infiniband_ports()),
        host_name(name, _addresses_of(name), own),
        *([given_host(host, own)] if host is not None else []),
        *(port_free(host or "127.0.0.1", port, use, flag) for port, use, flag in DEFAULT_PORTS),
    ]


def processors(total: int, allowed: int, quota: float | None) -> Finding:
    """`quota`: processors' worth of time that the control group grants; None for no limit."""
    limited = quota is not None and quota < allowed
    return warning_if(
        limited,
        "CPUs",
        f"{total}, {quota if limited else allowed:g} usable",
        "the container's quota is below its CPUs, so threads are stopped in mid-step; start engines with"
        f" --threads {max(1, int(quota or 0))} or raise the quota",
    )


def free_memory(total: int, available: int, limit: int | None) -> Finding:
    """Bytes; `limit`: what the control group has left, None for no limit."""
    usable = available if limit is None else min(available, limit)
    advice = "the KV cache of one rank on CPU alone takes 1GiB; set --kv-memory or free some"
    return warning_if(usable < MIN_MEMORY, "memory", f"{size(total)}, {size(usable)} available", advice)


def shared_memory(total: int) -> Finding:
    return warning_if(
        total < MIN_SHARED_MEMORY,
        "/dev/shm",
        size(total),
        "UCX and NCCL move bytes within one machine through it; give the container more"
        " (docker --shm-size=8g, Kubernetes: an emptyDir with medium Memory at /dev/shm)",
    )


def open_files(limit: int) -> Finding:
    """A frontend needs a file for every client and engine, an engine one for every peer."""
    unlimited = limit == resource.RLIM_INFINITY
    return warning_if(
        not unlimited and limit < MIN_FILES,
        "open files (ulimit -n)",
        "unlimited" if unlimited else str(limit),
        "every client and peer takes one; set `ulimit -n 65536`",
    )


def locked_memory(limit: int, *, rdma: bool) -> Finding:
    """RDMA pins the KV memory; nothing else does."""
    unlimited = limit == resource.RLIM_INFINITY
    return warning_if(
        rdma and not unlimited,
        "locked memory (ulimit -l)",
        ("unlimited" if unlimited else size(limit)) + ("" if rdma else ", not needed without RDMA"),
        "RDMA has to pin all KV memory: set `ulimit -l unlimited` (docker --ulimit memlock=-1)",
    )


def clock(source: str, now: float) -> Finding:
    """Leases run on each machine's own steady clock, so machines need not agree on the time."""
    found = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)) + f", source {source or 'unknown'}"
    if now < OLDEST_NOW:
        return warning("clock", found, "the time is wrong, so log lines mislead; start a time service")
    advice = "reading this clock is slow; boot with clocksource=tsc where the CPU allows it"
    return warning_if(source in SLOW_CLOCKS, "clock", found, advice)


@dataclass(frozen=True, slots=True)
class Interface:
    """A network interface. `speed`: Mbit/s; 0 where the driver does not say."""

    name: str
    addresses: Sequence[str]
    mtu: int
    speed: int = 0

    def __str__(self) -> str:
        speed = [f"{self.speed / 1000:g} Gbit/s"] if self.speed else []
        return f"{self.name} ({', '.join([*outward(self.addresses), f'MTU {self.mtu}', *speed])})"


def outward(addresses: Iterable[str]) -> list[str]:
    """Return the addresses that mean this machine to others too."""
    return [a for a in addresses if not is_loopback(a) and not ipaddress.ip_address(a).is_link_local]


def interfaces(found: Sequence[Interface]) -> Finding:
    reachable = [interface for interface in found if outward(interface.addresses)]
    if not reachable:
        advice = "engines on this machine can work together, but no other machine can reach them"
        return warning("network", "only loopback", advice)
    small = ", ".join(interface.name for interface in reachable if interface.mtu < SMALL_MTU)
    advice = f"the MTU of {small} is below {SMALL_MTU}, which costs throughput"
    return warning_if(bool(small), "network", ", ".join(map(str, reachable)), advice)


def infiniband(ports: Sequence[tuple[str, str, str]]) -> Finding:
    """`ports`: device:port, state, rate."""
    if not ports:
        return ok("RDMA devices", "none; between machines KV moves over TCP")
    text = ", ".join(f"{name} {state} {rate}" for name, state, rate in ports)
    active = any("ACTIVE" in state for _, state, _ in ports)
    return warning_if(not active, "RDMA devices", text, "no port is active: check the cable and the subnet manager")


def host_name(name: str, addresses: Sequence[str], own: Sequence[str]) -> Finding:
    """Tell whether the machine's own name would do as an address for others; no `addresses`: it is not known."""
    candidates = " or ".join(outward(own))
    advice = "give addresses, not this name: set --host"
    if candidates:
        advice += f" to {candidates} when an engine spans nodes"
    if not addresses:
        return warning("host name", f"{name} cannot be resolved", advice)
    text = f"{name} is {', '.join(addresses)}"
    if any(is_loopback(address) for address in addresses):
        text += ", which is loopback: others who are told this address reach themselves"
        return warning("host name", text, advice)
    if not set(addresses) & set(own):
        return warning("host name", f"{text}, which no interface of this machine has", advice)
    return ok("host name", text)


def given_host(host: str, own: Sequence[str]) -> Finding:
    address = resolve(host)
    text = host if host == str(address) else f"{host} is {address}"
    if is_loopback(str(address)):
        return warning("--host", f"{text}, loopback", "engines of other machines cannot reach this one under it")
    if str(address).partition("%")[0] not in own and not address.is_unspecified:
        return problem("--host", f"{text}, which no interface here has", f"this machine has {', '.join(own)}")
    return ok("--host", text)


def port_free(host: str, port: int, use: str, flag: str) -> Finding:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            advice = f"a router's {use} would not start on it; choose another with {flag}"
            return warning(f"port {port}", f"not free ({error.strerror})", advice)
    return ok(f"port {port}", f"free for a router's {use}")


def size(count: int) -> str:
    """Return a number of bytes as people write it."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


# --- reading ---------------------------------------------------------------------------------------------------------


def network_interfaces() -> list[Interface]:
    """Return the interfaces that have an IPv4 or IPv6 address."""
    stats = psutil.net_if_stats()
    found = []
    for name, entries in psutil.net_if_addrs().items():
        ip = [e.address.partition("%")[0] for e in entries if e.family in (socket.AF_INET, socket.AF_INET6)]
        if ip and name in stats:
            found.append(Interface(name, ip, stats[name].mtu, stats[name].speed))
    return found


def network_devices() -> set[str]:
    """Return the names that UCX_NET_DEVICES may hold: interfaces and InfiniBand devices, with and without port."""
    names = {name for _, name in socket.if_nameindex()}
    return names.union(*({name, name.partition(":")[0]} for name, _, _ in infiniband_ports()))


def infiniband_ports() -> list[tuple[str, str, str]]:
    """Return device:port, state and rate of each InfiniBand port."""
    return [
        (f"{port.parts[-3]}:{port.name}", re.sub(r"^\d+:\s*", "", _read(port / "state")), _read(port / "rate"))
        for port in sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    ]


def _addresses_of(name: str) -> list[str]:
    try:
        entries = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return sorted({str(entry[4][0]).partition("%")[0] for entry in entries})


def _cpu_quota() -> float | None:
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory_limit() -> int | None:
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    return max(0, int(limit) - int(used)) if limit.isdigit() and used.isdigit() else None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""

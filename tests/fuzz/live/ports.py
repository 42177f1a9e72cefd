"""The TCP ports that processes listen on, and how much memory they hold: what /proc says."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

LISTENING = "0A"


@dataclass(frozen=True, order=True)
class Port:
    """A port that a process listens on."""

    pid: int
    host: str
    number: int


def listening(pids: Iterable[int]) -> list[Port]:
    """Return every TCP port that one of these processes listens on."""
    sockets = dict(_sockets("/proc/net/tcp")) | dict(_sockets("/proc/net/tcp6"))
    found = {Port(pid, *sockets[inode]) for pid in pids for inode in _inodes(pid) if inode in sockets}
    return sorted(found)


def resident_mib(pid: int) -> float:
    """Return the process's resident memory in MiB. Raises FileNotFoundError if it is gone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise FileNotFoundError(f"process {pid} is ending")


def _sockets(table: str) -> Iterator[tuple[str, tuple[str, int]]]:
    """Yield inode, and address and port, of listening sockets; proc(5)."""
    for line in Path(table).read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == LISTENING:
            address, _, port = fields[1].partition(":")
            yield fields[9], ("::1" if len(address) > 8 else _dotted(address), int(port, 16))


def _dotted(address: str) -> str:
    """A wildcard is reached by loopback, too."""
    octets = [str(byte) for byte in reversed(bytes.fromhex(address))]
    return "127.0.0.1" if address == "00000000" else ".".join(octets)


def _inodes(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    for name in os.listdir(folder):
        try:
            target = os.readlink(f"{folder}/{name}")
        except FileNotFoundError:
            continue
        if target.startswith("socket:["):
            yield target[len("socket:[") : -1]

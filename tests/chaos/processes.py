"""Other processes and their connections, seen and touched from outside."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from dataclasses import dataclass
from pathlib import Path


def state_and_start(pid: int) -> tuple[str, int] | None:
    """Return the state letter and the start time in ticks (fields 3 and 22 of proc_pid_stat(5)); None if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return fields[0], int(fields[19])


@dataclass(frozen=True)
class Process:
    """One process for as long as it lives: its pid may be another's later."""

    pid: int
    start: int

    @classmethod
    def find(cls, pid: int) -> Process | None:
        found = state_and_start(pid)
        return None if found is None or found[0] in "ZX" else cls(pid, found[1])

    def send(self, number: signal.Signals) -> bool:
        """Send a signal; False if the process is gone."""
        if Process.find(self.pid) != self:
            return False
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            return False
        return True


def is_stopped(pid: int) -> bool:
    found = state_and_start(pid)
    return found is not None and found[0] in "Tt"


def in_session(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session
    except ProcessLookupError:
        return False


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def resident_and_files(pid: int) -> tuple[int, int]:
    """Return the resident memory in bytes and the number of open files; zeros if the process is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0


@dataclass(frozen=True)
class Connection:
    """One end of an established TCP connection. Addresses are HOST:PORT."""

    local: str
    remote: str
    pid: int


async def output_of(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    out, _ = await process.communicate()
    return out.decode(errors="replace")


async def connections() -> list[Connection]:
    """Return both ends of all established connections that belong to a process."""
    found = []
    for line in (await output_of("ss", "-Htnp", "state", "established")).splitlines():
        columns = line.split()
        if (owner := re.search(r"pid=(\d+)", line)) and len(columns) >= 4:
            found.append(Connection(columns[2], columns[3], int(owner[1])))
    return found


async def listeners(port: int) -> set[int]:
    """Return the processes that hold a socket which listens on the port."""
    out = await output_of("ss", "-Htlnp", "sport", "=", f":{port}")
    return {int(pid) for pid in re.findall(r"pid=(\d+)", out)}


async def cut(connection: Connection) -> bool:
    """Destroy a connection, as `ss -K` does: both ends see a reset. True if it is gone."""
    await output_of("ss", "-KHtn", "src", connection.local, "dst", connection.remote)
    return not (await output_of("ss", "-Htn", "src", connection.local, "dst", connection.remote)).strip()


async def can_cut() -> bool:
    """Whether this kernel and user can destroy a connection, tried on one of our own."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()[:2]) as ours,
        listener.accept()[0] as theirs,
    ):
        ends = [":".join(map(str, end.getsockname()[:2])) for end in (ours, theirs)]
        try:
            return await cut(Connection(ends[0], ends[1], os.getpid()))
        except FileNotFoundError:
            return False


def free_ports(number: int) -> list[int]:
    """Return ports that nobody listens on, below those that the kernel gives to outgoing connections."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found: list[int] = []
    start = 10_000 + os.getpid() * 16 % max(1, first - 11_000)
    for port in range(start, first):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
        if len(found) == number:
            return found
    raise RuntimeError(f"no {number} free ports from {start} to {first}")

"""Looking at processes from outside, through /proc."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def session_of(pid: int) -> set[int]:
    """The living processes of the session that this process has begun, its orphans too."""
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _session(entry) == pid}


def _session(entry: Path) -> int | None:
    """Fields of proc_pid_stat(5) after the name: state, parent, group, session."""
    try:
        fields = (entry / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[3]) if fields[0] not in "ZX" else None


def until(condition: Callable[[], object], seconds: float, step: float = 0.05) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


def until_it_stays(condition: Callable[[], object], seconds: float, stays: float = 1.0) -> bool:
    """Whether the condition came true in time and was true for a while."""
    deadline = time.monotonic() + seconds
    since: float | None = None
    while since is None or time.monotonic() - since < stays:
        if not condition():
            since = None
            if time.monotonic() > deadline:
                return False
        elif since is None:
            since = time.monotonic()
        time.sleep(0.05)
    return True


def survivors(pids: Iterable[int], seconds: float) -> set[int]:
    """Those that are still alive after so many seconds."""
    watched = set(pids)
    until(lambda: not any(is_alive(pid) for pid in watched), seconds)
    return {pid for pid in watched if is_alive(pid)}


def listening_on(port: int) -> set[int]:
    """Processes that hold a listening TCP socket on this port of loopback."""
    lines = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    inodes = {fields[9] for fields in lines if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port}
    links = {f"socket:[{inode}]" for inode in inodes}
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and links & _open_in(entry)}


def _open_in(entry: Path) -> set[str]:
    found = set()
    try:
        for descriptor in (entry / "fd").iterdir():
            found.add(str(descriptor.readlink()))
    except OSError:
        pass
    return found


def fork_server_of(pid: int) -> int:
    """The fork server of a command."""
    [found] = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _parent(entry) == pid and b"forkserver" in (entry / "cmdline").read_bytes()
    ]
    return found


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None

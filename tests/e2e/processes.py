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


def descendants(pid: int) -> set[int]:
    """Children of a process, their children, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    left = [pid]
    while left:
        own = children.get(left.pop(), [])
        found.update(own)
        left.extend(own)
    return found


def until(condition: Callable[[], object], seconds: float, step: float = 0.05) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


def survivors(pids: Iterable[int], seconds: float) -> set[int]:
    """Those that are still alive after so many seconds."""
    watched = set(pids)
    until(lambda: not any(is_alive(pid) for pid in watched), seconds)
    return {pid for pid in watched if is_alive(pid)}

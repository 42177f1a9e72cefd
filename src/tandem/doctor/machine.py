"""The machine: processors, memory, limits, clock. Readers are thin; what they read is judged by pure functions."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from tandem.doctor.finding import Finding, ok, warning

GIB = 1 << 30
MIN_MEMORY = 2 * GIB
MIN_SHARED_MEMORY = GIB
MIN_FILES = 4096
SLOW_CLOCKS = ("hpet", "acpi_pm", "jiffies", "refined-jiffies")
OLDEST_NOW = 1_700_000_000
"""A wall clock before this (November 2023) was never set."""


def check_machine() -> list[Finding]:
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    shared = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    return [
        processors(os.cpu_count() or 1, len(os.sched_getaffinity(0)), _cpu_quota()),
        memory(*_memory()),
        shared_memory(shared.f_frsize * shared.f_blocks if shared else 0),
        open_files(files),
        locked_memory(
            locked, rdma=os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband"))
        ),
        clock(_read("/sys/devices/system/clocksource/clocksource0/current_clocksource"), time.time()),
    ]


def processors(total: int, allowed: int, quota: float | None) -> Finding:
    """`quota`: processors' worth of time that the control group grants; None for no limit."""
    usable = allowed if quota is None else min(allowed, quota)
    found = f"{total}, {usable:g} usable"
    if quota is not None and quota < allowed:
        return warning(
            "CPUs",
            found,
            "the container's quota is below its CPUs, so threads are stopped in mid-step; start engines with"
            f" --threads {max(1, int(quota))} or raise the quota",
        )
    return ok("CPUs", found)


def memory(total: int, available: int, limit: int | None) -> Finding:
    """Bytes; `limit`: what the control group has left, None for no limit."""
    usable = available if limit is None else min(available, limit)
    found = f"{size(total)}, {size(usable)} available"
    if usable < MIN_MEMORY:
        return warning(
            "memory", found, "the KV cache of one rank on CPU alone takes 1GiB; set --kv-memory or free some"
        )
    return ok("memory", found)


def shared_memory(total: int) -> Finding:
    if total < MIN_SHARED_MEMORY:
        return warning(
            "/dev/shm",
            size(total),
            "UCX and NCCL move bytes within one machine through it; give the container more"
            " (docker --shm-size=8g, Kubernetes: an emptyDir with medium Memory at /dev/shm)",
        )
    return ok("/dev/shm", size(total))


def open_files(limit: int) -> Finding:
    """A frontend needs a file for every client and engine, an engine one for every peer."""
    if limit == resource.RLIM_INFINITY:
        return ok("open files (ulimit -n)", "unlimited")
    if limit < MIN_FILES:
        return warning("open files (ulimit -n)", str(limit), "every client and peer takes one; set `ulimit -n 65536`")
    return ok("open files (ulimit -n)", str(limit))


def locked_memory(limit: int, *, rdma: bool) -> Finding:
    """RDMA pins the KV memory; nothing else does."""
    found = "unlimited" if limit == resource.RLIM_INFINITY else size(limit)
    if rdma and limit != resource.RLIM_INFINITY:
        return warning(
            "locked memory (ulimit -l)",
            found,
            "RDMA has to pin all KV memory: set `ulimit -l unlimited` (docker --ulimit memlock=-1)",
        )
    return ok("locked memory (ulimit -l)", found + ("" if rdma else ", not needed without RDMA"))


def clock(source: str | None, now: float) -> Finding:
    """Leases run on each machine's own steady clock, so machines need not agree on the time."""
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    found = f"{shown}, source {source or 'unknown'}"
    if now < OLDEST_NOW:
        return warning("clock", found, "the time is wrong, so log lines mislead; start a time service")
    if source in SLOW_CLOCKS:
        return warning("clock", found, "reading this clock is slow; boot with clocksource=tsc where the CPU allows it")
    return ok("clock", found)


def size(count: int) -> str:
    """Bytes as people read them."""
    value = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


# --- reading ---------------------------------------------------------------------------------------------------------


def _cpu_quota() -> float | None:
    quota, _, period = (_read("/sys/fs/cgroup/cpu.max") or "max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memory() -> tuple[int, int, int | None]:
    lines = dict(line.split(":", 1) for line in (_read("/proc/meminfo") or "").splitlines())
    total, available = (int(lines.get(key, "0 kB").split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    limit, used = _read("/sys/fs/cgroup/memory.max"), _read("/sys/fs/cgroup/memory.current")
    if limit is None or used is None or not limit.isdigit():
        return total, available, None
    return total, available, max(0, int(limit) - int(used))


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None

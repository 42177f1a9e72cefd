"""Chooses the OpenMP runtime that torch computes with, and how its threads wait for each other.

torch brings GNU's libgomp. Intel's runtime has the same entry points and starts and ends a parallel region in a
fraction of the time; what is loaded into a process first, for all to see, is what torch is bound to.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

WAITING = {"KMP_BLOCKTIME": "1", "GOMP_SPINCOUNT": "300"}
"""A thread that waits spins for a bounded time and then sleeps: milliseconds in Intel's runtime, rounds in GNU's. Each
reads its own variable alone. Without a bound two engines stall each other on shared cores."""

SETS_WAITING = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY", "GOMP_SPINCOUNT")
_RUNTIME = re.compile(r"lib(gomp|iomp|omp)\d*[-.]")
_REGISTRATIONS = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class OpenMp:
    """What a process that is about to import torch should do.

    Attributes:
        library: to load first; None leaves the choice to the loader.
        settings: environment variables.
    """

    library: Path | None
    settings: Mapping[str, str]


def choose(system: str, machine: str, installed: Path | None, environment: Mapping[str, str]) -> OpenMp:
    """Choose a runtime and how its threads wait; what the user has set in the environment stands.

    Args:
        system, machine: as `sys.platform` and `platform.machine()` name them.
        installed: Intel's runtime, if it is there.
    """
    waits = any(environment.get(name) for name in SETS_WAITING)
    preloaded = re.split(r"[ :]", environment.get("LD_PRELOAD", ""))
    decided = any(_RUNTIME.match(Path(library).name) for library in preloaded)
    for_gnu = any(name.startswith("GOMP_") and value for name, value in environment.items())
    fits = system == "linux" and machine == "x86_64" and not decided and not for_gnu
    return OpenMp(installed if fits else None, {} if waits else WAITING)


def installed_runtime() -> Path | None:
    """Return where the package intel-openmp has put Intel's runtime; None without it."""
    try:
        files = distribution("intel-openmp").files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == "libiomp5.so"), None)


def prepare() -> None:
    """Load the runtime of choice into this process, which has not imported torch, and set how its threads wait."""
    chosen = choose(sys.platform, platform.machine(), installed_runtime(), os.environ)
    os.environ.update(chosen.settings)
    if chosen.library is not None:
        try:
            ctypes.CDLL(str(chosen.library), mode=ctypes.RTLD_GLOBAL)
        except OSError:  # it cannot be loaded here, so torch's own serves; `running` tells
            pass


def running() -> str:
    """Return the file name of the runtime that this process, which has imported torch, computes with; else none."""
    everything = ctypes.CDLL(None)
    info = _SymbolInfo()
    try:
        entry = ctypes.cast(everything.omp_get_max_threads, ctypes.c_void_p)
        found = everything.dladdr(entry, ctypes.byref(info))
    except AttributeError:
        return "none"
    return Path(os.fsdecode(info.file)).name if found and info.file else "none"


def drop_registration() -> None:
    """Remove the file by which Intel's runtime would recognise a second one in this process.

    It removes the file itself only at an exit with all its teardown, which children do not go through.
    """
    (_REGISTRATIONS / f"__KMP_REGISTERED_LIB_{os.getpid()}_{os.getuid()}").unlink(missing_ok=True)


class _SymbolInfo(ctypes.Structure):
    """`Dl_info` of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )

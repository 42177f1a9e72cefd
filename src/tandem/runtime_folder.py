"""The one folder of a command for its sockets and files, which is gone when the command is, however it ends.

The command removes it at its end, its children if the command was killed, and the next command if they were killed too.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import tempfile
from contextlib import suppress
from multiprocessing import process as processes
from pathlib import Path
from typing import IO

PREFIX = "tandem-"
OWNER = "owner"
"""A file in the folder that its owner has locked; the lock ends with the owner, in whatever way."""

_held: list[IO[bytes]] = []


@functools.cache
def runtime_folder() -> Path:
    """Return this process's folder, which only its user may enter; make it, and remove those of the dead, if need be.

    multiprocessing puts the socket of its fork server into it too.
    """
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent)
    folder = make_folder(parent)
    atexit.register(remove, folder)
    processes.current_process()._config.setdefault("tempdir", str(folder))  # type: ignore[attr-defined]
    return folder


def make_folder(parent: Path) -> Path:
    """Return a new folder that is this process's as long as it lives."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    # Locked before it has its name: nobody sees it without its lock and takes it for abandoned.
    lock = open(folder / f"{OWNER}.new", "wb")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.rename(lock.name, folder / OWNER)
    _held.append(lock)
    return folder


def remove_abandoned(parent: Path) -> None:
    """Remove the folders in `parent` whose owners are gone. Those of other users are left alone."""
    for folder in parent.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            with open(folder / OWNER, "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder, if it is still there."""
    shutil.rmtree(folder, ignore_errors=True)

"""What every child process runs around its own work; processes.py starts it."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from tandem.errors import TandemError
from tandem.reports import Report, Reporter, error_report
from tandem.runtime_folder import remove

PIPE_BYTES = 1 << 20
"""For a burst of log lines, while the owner does something else; what the system permits at most."""


def child_main(
    pipe: Connection, out: Connection, folder: Path, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """Run `target(report, *args)`; the first frame of every child.

    Args:
        pipe: to the owner, who takes its end for the child's.
        out: takes stdout and stderr. It does not block: what the owner does not read in time is lost.
        folder: the owner's runtime folder.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides; Ctrl-C reaches the whole process group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _take_output(out)
    threading.Thread(target=_die_with_owner, args=(folder,), name="owner watch", daemon=True).start()

    def report(message: Report) -> None:
        with contextlib.suppress(OSError):
            pipe.send(message)

    try:
        target(report, *args)
    except TandemError as error:
        end_child(report, error)
    except BaseException:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        _exit(1)
    _exit(0)


def end_child(report: Reporter, error: Exception) -> NoReturn:
    """End this process, which is a child, with an error. Any of its threads may call it."""
    report(error_report(error))
    _exit(1)


def _take_output(out: Connection) -> None:
    with contextlib.suppress(OSError):
        fcntl.fcntl(out.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    os.set_blocking(out.fileno(), False)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    out.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _die_with_owner(folder: Path) -> None:
    owner = multiprocessing.parent_process()
    if owner is not None:
        owner.join()
        remove(folder)
        os._exit(1)


def _exit(code: int) -> NoReturn:
    """End this process without the interpreter's teardown, which can hang on foreign threads (UCX, gloo, OpenMP)."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)

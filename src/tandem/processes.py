"""Child processes with an owner: it hears their reports and how they end, and none outlives it.

Children come from one fork server which has imported the heavy modules once, so that sixteen ranks cost one import
of torch. They do not import the caller's main module again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn

from tandem.errors import EngineStopped, StartError, TandemError
from tandem.reports import Ended, ErrorReport, Report, Reporter, error_report

PRELOAD = ("tandem.engine.start.rank_process", "tandem.router.process")
TERM_SECONDS = 4.0
"""For children to end by themselves; longer than what an engine takes in good order (engine/timeouts.py)."""

CHILD_DEFAULTS = {
    # Threads that wait for others give up their core: with spinning ones, two engines on one machine stall each other.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Every failure of a process group or store becomes a sentence of ours; its C++ stack trace helps nobody.
    "TORCH_CPP_LOG_LEVEL": "FATAL",
}
"""Environment of the children where the user has set nothing; it must be there before torch is imported."""

LAST_LINES = 20
SETTLE_SECONDS = 0.5
"""When one rank dies, others follow within moments; the one that knows why may be among them."""


@dataclass(slots=True)
class Child:
    """A child process.

    Attributes:
        name: for people.
        reports: not yet taken, in order.
        endings: what it reported of its own end.
        lines: the last lines of what it printed.
    """

    name: str
    process: BaseProcess
    pipe: Connection
    reports: deque[Report] = field(default_factory=deque)
    endings: list[ErrorReport | Ended] = field(default_factory=list)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    reader: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def join(self, seconds: float) -> None:
        """Wait until it has ended; return at once if it never started."""
        if self.process.pid is not None:
            self.process.join(seconds)

    def receive(self) -> None:
        """Move what it has sent into `reports` and `endings`."""
        try:
            while not self.pipe.closed and self.pipe.poll():
                report: Report = self.pipe.recv()
                if isinstance(report, ErrorReport | Ended):
                    self.endings.append(report)
                else:
                    self.reports.append(report)
        except (EOFError, OSError):
            self.pipe.close()

    def exit_report(self) -> str:
        """Return how it ended, with its last lines."""
        if self.reader is not None:
            self.reader.join(1.0)
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
        tail = "\n".join(self.lines)
        return f"{self.name} {how}" + (f"; its last lines:\n{tail}" if tail else "")


class ChildProcesses:
    """All children of a command; as a context manager, it leaves none behind whatever happens.

    Args:
        echo: called with every line that a child prints.
        preload: modules that the fork server imports once for all.
    """

    def __init__(self, echo: Callable[[str], None] | None = None, preload: Sequence[str] = PRELOAD) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        for variable, value in CHILD_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        self._echo = echo
        self.children: list[Child] = []
        self.ending = False

    def __enter__(self) -> ChildProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def warm(self) -> None:
        """Let the fork server import now, beside whatever comes before the first child."""
        resource_tracker.ensure_running()  # by itself, as starting it unblocks SIGINT
        # Ctrl-C reaches the whole process group: the fork server inherits that it is not for it, while it imports.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with _without_main():
                forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def start(self, name: str, target: Callable[..., None], *args: Any) -> Child:
        """Run `target(report, *args)` in a child. Arguments must pickle; sockets do."""
        self.warm()
        ours, theirs = self._context.Pipe()
        out, out_write = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=_child_main, args=(theirs, out_write, target, args), name=name, daemon=False
        )
        child = Child(name, process, ours)
        self.children.append(child)  # before it starts: an interrupt amid this leaves nobody behind
        with _without_main():
            process.start()
        theirs.close()
        out_write.close()
        child.reader = threading.Thread(target=self._read, args=(child, out), name=f"{name} output", daemon=True)
        child.reader.start()
        return child

    def _read(self, child: Child, out: Connection) -> None:
        with os.fdopen(os.dup(out.fileno()), errors="replace") as stream:
            out.close()
            for line in stream:
                child.lines.append(line.rstrip("\n"))
                if self._echo is not None:
                    self._echo(line.rstrip("\n"))

    def next_report(self, children: Sequence[Child], seconds: float | None) -> tuple[Child, Report] | None:
        """Wait for the next report of one of these children and return it; None when the time is over.

        Raises StartError or EngineStopped as `check` does, when any child ends.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            self.check()
            for child in children:
                if child.reports:
                    return child, child.reports.popleft()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return None
            handles: list[Any] = [child.process.sentinel for child in self.children]
            handles += [child.pipe for child in self.children if not child.pipe.closed]
            connection.wait(handles, left)

    def check(self) -> None:
        """Raise StartError if a child has ended or reported an error, with the root causes as far as they are known.

        Raises EngineStopped instead where children reported that they end in good order.
        """
        for child in self.children:
            child.receive()
        if self.ending or not (self._errors() or any(not child.alive for child in self.children)):
            return
        self._settle()
        errors = self._errors()
        ended = [ending.reason for child in self.children for ending in child.endings if isinstance(ending, Ended)]
        if ended and not errors:
            raise EngineStopped(ended[0])
        causes = [error.text for error in errors if error.is_root_cause] or [error.text for error in errors]
        deaths = (child.exit_report() for child in self.children if not child.alive)
        raise StartError("\n".join(dict.fromkeys(causes) or deaths))

    def _errors(self) -> list[ErrorReport]:
        return [error for child in self.children for error in child.endings if isinstance(error, ErrorReport)]

    def _settle(self) -> None:
        deadline = time.monotonic() + SETTLE_SECONDS
        while time.monotonic() < deadline and any(child.alive for child in self.children):
            connection.wait([c.process.sentinel for c in self.children if c.alive], 0.1)
        for child in self.children:
            child.receive()

    def stop(self, seconds: float = TERM_SECONDS) -> None:
        """Terminate all, and kill those that are still there after `seconds`. Idempotent."""
        self.ending = True
        deadline = time.monotonic() + seconds
        for child in self.children:
            if child.alive:
                child.process.terminate()
        for child in self.children:
            child.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Kill all at once."""
        self.ending = True
        for child in self.children:
            if child.alive:
                child.process.kill()
        for child in self.children:
            child.join(1.0)


@contextlib.contextmanager
def ending_fork_server() -> Iterator[None]:
    """End the fork server at once, even while it imports, when the body ends; the command's process ends with it.

    By itself it goes when it finds its owner gone, but it looks only once its imports are done.
    """
    try:
        yield
    finally:
        pid = getattr(getattr(forkserver, "_forkserver", None), "_forkserver_pid", None)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep children from importing the main module, as multiprocessing has them do; ours need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _child_main(pipe: Connection, out: Connection, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    """Run `target`; the first frame of every child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides; Ctrl-C reaches the whole process group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    out.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    threading.Thread(target=_die_with_owner, name="owner watch", daemon=True).start()

    def report(message: Report) -> None:
        with contextlib.suppress(OSError):
            pipe.send(message)

    try:
        target(report, *args)
    except TandemError as error:
        end_child(report, error)
    except BaseException:
        traceback.print_exc()
        _exit(1)
    _exit(0)


def end_child(report: Reporter, error: Exception) -> NoReturn:
    """End this process, which is a child, with an error. Any of its threads may call it."""
    report(error_report(error))
    _exit(1)


def _die_with_owner() -> None:
    owner = multiprocessing.parent_process()
    if owner is not None:
        owner.join()
        os._exit(1)


def _exit(code: int) -> NoReturn:
    """End this process without the interpreter's teardown, which can hang on foreign threads (UCX, gloo, OpenMP)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

"""Child processes with an owner: it hears their reports and how they end, and none outlives it.

Children come from one fork server which has imported the heavy modules once, so that sixteen ranks cost one import
of torch. They do not import the caller's main module again. A fork server that is killed is replaced; what it had
started goes on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from tandem.child_main import child_main
from tandem.errors import EngineStopped, StartError
from tandem.reports import Ended, ErrorReport, Report
from tandem.runtime_folder import runtime_folder

PRELOAD = ("tandem.fork_server", "tandem.engine.start.rank_process", "tandem.router.process")
TERM_SECONDS = 4.0
"""For children to end by themselves; longer than what an engine takes in good order (engine/timeouts.py)."""

CHILD_DEFAULTS = {
    # Every failure of a process group or store becomes a sentence of ours; its C++ stack trace helps nobody.
    "TORCH_CPP_LOG_LEVEL": "FATAL",
}
"""Environment of the children where the user has set nothing; it must be there before torch is imported."""

LAST_LINES = 20
SETTLE_SECONDS = 0.5
"""When one rank dies, others follow within moments; the one that knows why may be among them."""

UNKNOWN_EXIT = 255
"""The exit code that multiprocessing reports of a child whose fork server, which alone could know it, is gone."""


@dataclass(slots=True)
class Child:
    """A child process.

    Attributes:
        name: for people.
        pipe: brings its reports. It ends with the process: not even a fork server that is gone can hide that.
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
        self.receive()
        return self.process.pid is not None and not self.pipe.closed

    @property
    def ends(self) -> bool:
        """Whether it has ended, or has reported that it does."""
        return not self.alive or bool(self.endings)

    def join(self, seconds: float) -> None:
        """Wait until it has ended; return at once if it never started."""
        deadline = time.monotonic() + seconds
        while self.alive and (left := deadline - time.monotonic()) > 0:
            connection.wait([self.pipe], left)
        if self.process.pid is not None and not self.alive:
            self.process.join(1.0)  # the pipe ends a moment before the process does

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal, if it is there."""
        if self.alive and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, number)

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
        self.join(1.0)
        if self.reader is not None:
            self.reader.join(1.0)
        tail = "\n".join(self.lines)
        return f"{self.name} {_how(self.process.exitcode)}" + (f"; its last lines:\n{tail}" if tail else "")


def _how(code: int | None) -> str:
    if code == UNKNOWN_EXIT:
        return "has ended, nobody knows how: the fork server that had started it was killed too"
    return f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"


class ChildProcesses:
    """All children of a command; as a context manager, it leaves none behind whatever happens.

    Args:
        echo: called with every line that a child prints; it must not wait for anybody.
        preload: modules that the fork server imports once for all.
    """

    def __init__(self, echo: Callable[[str], None] | None = None, preload: Sequence[str] = PRELOAD) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preload))
        for variable, value in CHILD_DEFAULTS.items():
            os.environ.setdefault(variable, value)
        self._echo = echo
        self._folder = runtime_folder()
        self.children: list[Child] = []
        self.ending = False
        self._ended, self._end = self._context.Pipe(duplex=False)

    def __enter__(self) -> ChildProcesses:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def warm(self) -> None:
        """Let the fork server import now, beside whatever comes before the first child; replace one that is gone."""
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
        try:
            return self._start(name, target, args)
        except (EOFError, ConnectionError, FileNotFoundError):  # the fork server was killed a moment ago
            self.children = [child for child in self.children if child.process.pid is not None]
            return self._start(name, target, args)

    def _start(self, name: str, target: Callable[..., None], args: tuple[Any, ...]) -> Child:
        self.warm()
        ours, theirs = self._context.Pipe()
        out, out_write = self._context.Pipe(duplex=False)
        process = self._context.Process(
            target=child_main, args=(theirs, out_write, self._folder, target, args), name=name, daemon=False
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
            self.wait(left)

    def wait(self, seconds: float | None) -> None:
        """Wait until a child reports or ends, the time is over, or another thread has called `end`."""
        connection.wait([self._ended, *(child.pipe for child in self.children if not child.pipe.closed)], seconds)
        for child in self.children:
            child.receive()

    def check(self) -> None:
        """Raise StartError if a child has ended or reported an error, with the root causes as far as they are known.

        Raises EngineStopped instead where children reported that they end in good order.
        """
        if self.ending or not any([child.ends for child in self.children]):
            return
        settle(self.children)
        ended = [ending.reason for child in self.children for ending in child.endings if isinstance(ending, Ended)]
        if ended and not _errors(self.children):
            raise EngineStopped(ended[0])
        raise StartError(why_ended(self.children))

    def end(self) -> None:
        """Let no thread wait here any more, nor take what ends from now on for a death. Idempotent."""
        self.ending = True
        self._end.close()

    def stop(self, seconds: float = TERM_SECONDS) -> None:
        """Terminate all, and kill those that are still there after `seconds`. Idempotent."""
        self.ending = True
        _stop(self.children, seconds)

    def kill(self) -> None:
        """Kill all at once."""
        self.ending = True
        _kill(self.children)

    def drop(self, children: Iterable[Child], seconds: float) -> None:
        """Terminate these, kill those that are still there after `seconds`, and forget them."""
        gone = list(children)
        _stop(gone, seconds)
        self.children = [child for child in self.children if child not in gone]
        for child in gone:
            child.pipe.close()


def settle(children: Sequence[Child]) -> None:
    """Give these, of which one has ended, a moment to end too and to say why."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while time.monotonic() < deadline and (pipes := [child.pipe for child in children if child.alive]):
        connection.wait(pipes, 0.1)


def why_ended(children: Sequence[Child]) -> str:
    """Return what these report of their end: root causes if there are any, else how they died."""
    errors = _errors(children)
    causes = [error.text for error in errors if error.is_root_cause] or [error.text for error in errors]
    deaths = (child.exit_report() for child in children if not child.alive)
    return "\n".join(dict.fromkeys(causes) or deaths)


def _errors(children: Sequence[Child]) -> list[ErrorReport]:
    return [error for child in children for error in child.endings if isinstance(error, ErrorReport)]


def _stop(children: Sequence[Child], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for child in children:
        child.send_signal(signal.SIGTERM)
    for child in children:
        child.join(max(0.0, deadline - time.monotonic()))
    _kill(children)


def _kill(children: Sequence[Child]) -> None:
    for child in children:
        child.send_signal(signal.SIGKILL)
    for child in children:
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

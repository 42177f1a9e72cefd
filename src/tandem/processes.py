"""Child processes with an owner: a start deadline, their last words, and an end that leaves nothing behind.

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
from typing import Any

from tandem.errors import EngineStopped, StartError, TandemError

PRELOAD = ("tandem.engine.start.rank_process", "tandem.router.process")
TERM_SECONDS = 4.0

CHILD_DEFAULTS = {
    # Threads that wait for others give up their core: with spinning ones, two engines on one machine stall each other.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Every failure of a process group or store becomes a sentence of ours; its C++ stack trace helps nobody.
    "TORCH_CPP_LOG_LEVEL": "FATAL",
}
"""Environment of the children where the user has set nothing; it must be there before torch is imported."""

LAST_LINES = 20

Report = Callable[..., None]
"""What a child tells its owner: `report(word, value)`."""


@dataclass(slots=True)
class Child:
    """A child process.

    Attributes:
        name: for people.
        reports: what it told, in order, not yet taken.
        lines: the last lines of what it printed.
    """

    name: str
    process: BaseProcess
    pipe: Connection
    reports: deque[tuple[str, Any]] = field(default_factory=deque)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    reader: threading.Thread | None = None

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def join(self, seconds: float) -> None:
        """Until it has ended; at once if it never started."""
        if self.process.pid is not None:
            self.process.join(seconds)

    def receive(self) -> None:
        """Move what it told into `reports`."""
        try:
            while not self.pipe.closed and self.pipe.poll():
                self.reports.append(self.pipe.recv())
        except (EOFError, OSError):
            self.pipe.close()

    def exit_report(self) -> str:
        """How it ended, and its last lines."""
        self.receive()
        if self.reader is not None:
            self.reader.join(1.0)
        for word, value in self.reports:
            if word == "error":
                return f"{self.name}: {value}"
        code = self.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exited with {code}"
        tail = "\n".join(self.lines)
        return f"{self.name} {how}" + (f"; its last lines:\n{tail}" if tail else "")


class ChildProcesses:
    """All children of a command. Use as a context manager: whatever happens, none is left behind.

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
        """Start importing now, beside whatever comes before the first child."""

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
            target=_child_main, args=(name, theirs, out_write, target, args), name=name, daemon=False
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

    def wait(self, children: Sequence[Child], seconds: float | None) -> bool:
        """Until one of the children told something; False if the time is over.

        Raises StartError when any child of the family ends.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while True:
            for child in children:
                child.receive()
            self.check()
            if any(child.reports for child in children):
                return True
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return False
            handles: list[Any] = [child.process.sentinel for child in self.children]
            handles += [child.pipe for child in children if not child.pipe.closed]
            connection.wait(handles, left)

    def check(self) -> None:
        """Raises StartError with the last words of a child that has ended or told of an error.

        Raises EngineStopped where children told that they were to end.
        """
        if self.ending:
            return
        for child in self.children:
            if not child.alive or any(word == "error" for word, _ in child.reports):
                self._settle()
                if (ended := self._ended()) is not None:
                    raise EngineStopped(ended)
                raise StartError("\n".join(self._exit_reports()))

    def _settle(self) -> None:
        """When one rank dies, others follow within moments; the one that knows why may be among them."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and any(child.alive for child in self.children):
            connection.wait([c.process.sentinel for c in self.children if c.alive], 0.1)
        for child in self.children:
            child.receive()

    def _ended(self) -> str | None:
        """What a child told of its end in good order, if none told of an error."""
        told = [report for child in self.children for report in child.reports]
        if any(word == "error" for word, _ in told):
            return None
        return next((str(value) for word, value in told if word == "ended"), None)

    def _exit_reports(self) -> list[str]:
        """Told errors first, each once; how processes ended only if none told anything."""
        for child in self.children:
            child.receive()
        told = [str(value) for child in self.children for word, value in child.reports if word == "error"]
        known = [text for text in told if "was lost" not in text] or told
        if known:
            return list(dict.fromkeys(known))
        return [child.exit_report() for child in self.children if not child.alive]

    def stop(self, seconds: float = TERM_SECONDS) -> None:
        """Ask all to end, then make them. Idempotent."""
        self.ending = True
        deadline = time.monotonic() + seconds
        for child in self.children:
            if child.alive:
                child.process.terminate()
        for child in self.children:
            child.join(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Now."""
        self.ending = True
        for child in self.children:
            if child.alive:
                child.process.kill()
        for child in self.children:
            child.join(1.0)


@contextlib.contextmanager
def ending_fork_server() -> Iterator[None]:
    """For a command whose process ends with this: the fork server ends too, at once, even while it imports.

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
    """multiprocessing has children import the main module again; ours need nothing of it."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _child_main(
    name: str, pipe: Connection, out: Connection, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    """First frame of every child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the owner decides; Ctrl-C reaches the whole process group
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(out.fileno(), 1)
    os.dup2(out.fileno(), 2)
    out.close()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    threading.Thread(target=_die_with_owner, name="owner watch", daemon=True).start()

    def report(word: str, value: Any = None) -> None:
        with contextlib.suppress(OSError):
            pipe.send((word, value))

    try:
        target(report, *args)
    except TandemError as error:
        report("error", str(error))
        _exit(1)
    except BaseException:
        traceback.print_exc()
        _exit(1)
    _exit(0)


def _die_with_owner() -> None:
    owner = multiprocessing.parent_process()
    if owner is not None:
        owner.join()
        os._exit(1)


def _exit(code: int) -> None:
    """Without the interpreter's teardown, which can hang on foreign threads (UCX, gloo, OpenMP)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

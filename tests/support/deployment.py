"""`tandem serve` as a person runs it: a command in a process group of its own."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import tandem
from tests.support.http import Http
from tests.support.processes import session_of, survivors

START_SECONDS = 120.0
STOP_SECONDS = 30.0
SOURCE = Path(tandem.__file__).parent.parent


def clean_environment() -> dict[str, str]:
    """One thread a rank: many ranks share few cores here. No TANDEM_... variable of whoever runs the tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")}
    path = os.pathsep.join(filter(None, (str(SOURCE), kept.get("PYTHONPATH"))))
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "COLUMNS": "200"}


def tandem_command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "tandem", *map(str, arguments)]


@dataclass(frozen=True)
class Ended:
    """How a command ended. `seconds`: until it did."""

    code: int
    out: str
    err: str
    seconds: float


def run_tandem(*arguments: str | Path, environment: dict[str, str] | None = None) -> Ended:
    """A command that is expected to end by itself, and to leave nothing running."""
    # Files, as pipes would also wait for whatever the command has left running.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.monotonic()
        process = subprocess.Popen(
            tandem_command(*arguments),
            env=clean_environment() | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            code = process.wait(START_SECONDS)
            seconds = time.monotonic() - started
            left = survivors(session_of(process.pid), STOP_SECONDS)
        finally:
            for pid in session_of(process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert not left, f"{process.args!r} left processes {sorted(left)} behind"
        out.seek(0)
        err.seek(0)
        return Ended(code, out.read(), err.read(), seconds)


class Deployment:
    """A running `tandem serve`. As a context manager it is stopped at the end, and must leave nothing behind.

    Args:
        arguments: of `tandem serve`; the port is any that is free.
        command: another one that prints its URL, such as `router`.
        wait: until it serves; else `http` is not there.

    Attributes:
        http: the router's API.
    """

    def __init__(self, *arguments: str | Path, command: str = "serve", wait: bool = True) -> None:
        self.command = tandem_command(command, *arguments, "--port", "0")
        self.process = subprocess.Popen(
            self.command,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._lines: list[str] = []
        self._said: queue.Queue[str | None] = queue.Queue()
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_log, self._read_said)]
        for reader in self._readers:
            reader.start()
        if not wait:
            return
        try:
            self.http = Http(self._url())
        except BaseException:
            self.kill()
            raise

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is not None:
            self.kill()
        else:
            self.close()

    @property
    def log(self) -> str:
        """All that it wrote to stderr so far."""
        return "\n".join(self._lines)

    @property
    def pids(self) -> set[int]:
        """The command and everything it has started."""
        return session_of(self.process.pid)

    def engines(self) -> dict[str, dict[str, Any]]:
        """What /tandem/engines says, by engine id."""
        return {engine["engine_id"]: engine for engine in self.http.get("/tandem/engines").json["engines"]}

    def engine(self, engine_id: str) -> Http:
        """The engine's own API."""
        return Http(f"http://{self.engines()[engine_id]['http_address']}")

    def end(self, number: signal.Signals = signal.SIGINT, seconds: float = STOP_SECONDS) -> tuple[int, float]:
        """Send a signal to the command; its exit code, and the seconds until it ended."""
        started = time.monotonic()
        self.process.send_signal(number)
        return self.wait(seconds), time.monotonic() - started

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        """Its exit code; all that it wrote is in the log then."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self._name} did not end within {seconds:.0f} s; it said:\n{self.log}") from None
        for reader in self._readers:
            reader.join(5.0)
        return code

    def close(self) -> None:
        """Ctrl-C; everything is gone then."""
        if self.process.poll() is not None:
            raise AssertionError(f"{self._name} ended by itself with {self.process.returncode}; it said:\n{self.log}")
        pids = self.pids
        try:
            code, _ = self.end()
        finally:
            left = survivors(pids, 5.0)
            self.kill()
        assert not left, f"{self._name} left processes {sorted(left)} behind; it said:\n{self.log}"
        assert code == 0, f"{self._name} ended with {code}; it said:\n{self.log}"

    def kill(self) -> None:
        """Whatever there is, at once."""
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    @property
    def _name(self) -> str:
        return " ".join(["tandem", *self.command[3:]])

    def _url(self) -> str:
        try:
            url = self._said.get(timeout=START_SECONDS)
        except queue.Empty:
            raise AssertionError(f"{self._name} was not ready in {START_SECONDS:.0f} s; it said:\n{self.log}") from None
        if url is None:
            code = self.process.wait(STOP_SECONDS)
            self._readers[0].join(5.0)
            raise AssertionError(f"{self._name} ended with {code}; it said:\n{self.log}")
        return url

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.append(line.rstrip("\n"))

    def _read_said(self) -> None:
        """Its stdout: the URL, once a request would be answered, and nothing else."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(line.strip())
        self._said.put(None)


def flags(**options: object) -> Sequence[str]:
    """`kv_memory="1MiB"` as `--kv-memory 1MiB`."""
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]

"""Shows a person how a start goes: progress bars, a line per engine, the panel with the URL."""

from __future__ import annotations

import os
import sys

from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tandem.bounded_writer import BoundedWriter
from tandem.errors import TandemError
from tandem.wire.engine_status import EngineStatus

STDOUT = 1
LAST_SECONDS = 1.0
"""For a reader to take what is left, at the end of a command and before its URL is told."""


class Console:
    """Writes to stderr, so that stdout stays for results. Use as a context manager while things start.

    Nothing here waits for a reader of stderr.
    """

    def __init__(self) -> None:
        self._writer = BoundedWriter(sys.stderr)
        self.console = RichConsole(file=self._writer, highlight=False)  # type: ignore[arg-type]  # what rich needs of a file
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def echo(self, line: str) -> None:
        """Print a line of a child process unchanged."""
        self.console.print(line, markup=False, soft_wrap=True)

    def loaded(self, engine: str, done: int, total: int) -> None:
        """Move the progress bar of an engine. `done`, `total`: bytes of weights."""
        if engine not in self._tasks:
            self._tasks[engine] = self._progress.add_task(f"{engine}: weights", total=total)
        self._progress.update(self._tasks[engine], completed=done, total=total)

    def ready(self, engine: str, status: EngineStatus, api: str | None) -> None:
        """Say that an engine can serve. `api`: URL of its own API, if it is on this node."""
        if engine in self._tasks:
            self._progress.remove_task(self._tasks.pop(engine))
        shape = f"tp {status.tp}, pp {status.pp}" + (f", {status.nnodes} nodes" if status.nnodes > 1 else "")
        where = f", API {api}" if api else ""
        self.console.print(
            f"{engine} ready: {status.role} engine {status.engine_id}, {shape}, {status.connector},"
            f" {status.kv.blocks} blocks of {status.kv.block_size} tokens{where}",
            soft_wrap=True,
        )

    def panel(self, lines: list[str], copyable: str | None = None) -> None:
        """Print a box, and under it, unbroken, a command to copy."""
        self.console.print(Panel.fit("\n".join(lines), title="Tandem", border_style="green"))
        if copyable is not None:
            self.console.print(copyable, markup=False, soft_wrap=True)

    def url(self, url: str) -> None:
        """Print the URL alone on stdout, for a program that started the command; a person has the panel.

        Raises TandemError if that program cannot be told.
        """
        if sys.stdout.isatty():
            return
        self._writer.drain(LAST_SECONDS)  # what was said before it is to be read before it
        try:
            os.write(STDOUT, f"{url}\n".encode())  # by print, what failed would fail once more at the exit
        except OSError as error:
            raise TandemError(f"the URL cannot be written to stdout: {error.strerror}") from None

    def failed(self, text: str) -> None:
        self._writer.write(f"tandem: {text}\n")

    def close(self) -> None:
        """Let what is left be read, in bounded time."""
        self._writer.drain(LAST_SECONDS)

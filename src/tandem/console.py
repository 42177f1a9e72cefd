"""Shows a person how a start goes: progress bars, a line per engine, the panel with the URL."""

from __future__ import annotations

import sys

from rich.console import Console as RichConsole
from rich.panel import Panel
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from tandem.wire.messages import EngineStatus


class Console:
    """Writes to stderr, so that stdout stays for results. Use as a context manager while things start."""

    def __init__(self) -> None:
        self.console = RichConsole(stderr=True, highlight=False)
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
        """Print the URL alone on stdout, for a program that started the command; a person has the panel."""
        if not sys.stdout.isatty():
            print(url, flush=True)

    def failed(self, text: str) -> None:
        print(f"tandem: {text}", file=sys.stderr)

"""Runs children until they are told to stop: Ctrl-C once in good order, twice at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from types import FrameType

from tandem.commands.console import Console
from tandem.errors import EngineStopped, TandemError
from tandem.processes import PRELOAD, ChildProcesses, ending_fork_server


class Stop(KeyboardInterrupt):
    """Ctrl-C or SIGTERM came."""


def supervised(body: Callable[[ChildProcesses, Console], int], preload: Sequence[str] = PRELOAD) -> int:
    """Run `body` with a family of children, which are gone when this returns; its value is the exit code."""
    console = Console()
    with ending_fork_server(), ChildProcesses(echo=console.echo, preload=preload) as family:
        _take_signals(family)
        try:
            return body(family, console)
        except EngineStopped as stopped:
            console.echo(str(stopped))
            return 0
        except TandemError as error:
            console.failed(str(error))
            return 1
        except Stop:
            console.echo("stopping ...")
            return 0
    return 0


def wait_forever(family: ChildProcesses) -> None:
    """Until a signal comes or a child dies; then raises."""
    while True:
        family.next_report(family.children, None)


def _take_signals(family: ChildProcesses) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        if family.ending:
            family.kill()
            return
        family.ending = True
        raise Stop

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)

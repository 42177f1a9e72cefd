"""Runs child processes until they are told to stop: Ctrl-C once ends them in good order, twice at once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from types import FrameType

from tandem.console import Console
from tandem.errors import EngineStopped, TandemError
from tandem.processes import PRELOAD, ChildProcesses, ending_fork_server


class StopSignal(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, whose number this is, came."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def supervised(body: Callable[[ChildProcesses, Console], int], preload: Sequence[str] = PRELOAD) -> int:
    """Run `body` and return its exit code; the children that it starts are gone then."""
    console = Console()
    with ending_fork_server(), ChildProcesses(echo=console.echo, preload=preload) as children:
        _take_signals(children)
        try:
            return body(children, console)
        except EngineStopped as stopped:
            console.echo(str(stopped))
            return 0
        except TandemError as error:
            console.failed(str(error))
            return 1
        except StopSignal:
            console.echo("stopping ...")
            return 0
        finally:
            children.stop()
            console.close()


def wait_forever(children: ChildProcesses) -> None:
    """Wait until a signal comes or a child dies, and raise then."""
    while True:
        children.next_report(children.children, None)


def _take_signals(children: ChildProcesses) -> None:
    def handle(number: int, frame: FrameType | None) -> None:
        if children.ending:
            children.kill()
            return
        children.ending = True
        raise StopSignal(number)

    signal.signal(signal.SIGINT, handle)
    signal.signal(signal.SIGTERM, handle)

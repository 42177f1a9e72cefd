"""`tandem router`."""

from __future__ import annotations

from tandem.commands.supervise import supervised, wait_forever
from tandem.config import RouterConfig
from tandem.console import Console
from tandem.local_cluster import start_router
from tandem.processes import ChildProcesses


def run_router(config: RouterConfig) -> int:
    """Route until stopped; returns the exit code."""

    def body(children: ChildProcesses, console: Console) -> int:
        router = start_router(children, config)
        url = f"{config.http.scheme}://{router.http}"
        console.panel(
            [
                f"OpenAI API at [bold cyan]{url}/v1[/bold cyan], once engines are there",
                f"Engines register with --router {router.control}",
                "Ctrl-C stops it",
            ]
        )
        console.url(url)
        wait_forever(children)
        return 0

    return supervised(body, preload=["tandem.router.process"])

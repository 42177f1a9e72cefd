"""`tandem router`."""

from __future__ import annotations

from tandem.commands.supervise import supervised, wait_forever
from tandem.config import RouterConfig
from tandem.console import Console
from tandem.local_cluster import start_router
from tandem.processes import ChildProcesses
from tandem.wire.keys import NO_KEY, load_key


def run_router(config: RouterConfig) -> int:
    """Route until stopped; returns the exit code."""

    def body(children: ChildProcesses, console: Console) -> int:
        key = load_key(config.access.cluster_key_file)
        if key is None:
            console.echo(f"router: {NO_KEY}")
        router = start_router(children, config, key)
        router.close()
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

"""`tandem router`."""

from __future__ import annotations

from tandem.commands.screen import Screen
from tandem.commands.supervise import supervised, wait_forever
from tandem.config import RouterConfig
from tandem.processes import Family
from tandem.serve import start_router


def run_router(config: RouterConfig, start_timeout: float) -> int:
    def body(family: Family, screen: Screen) -> int:
        router = start_router(family, config, start_timeout)
        screen.panel(
            [
                f"OpenAI API at [bold cyan]http://{router.http}/v1[/bold cyan], once engines are there",
                f"Engines register with --router {router.control}",
                "Ctrl-C stops it",
            ]
        )
        screen.url(f"http://{router.http}")
        wait_forever(family)
        return 0

    return supervised(body, preload=["tandem.router.server"])

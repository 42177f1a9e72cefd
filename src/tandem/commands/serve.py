"""`tandem serve`: engines and router with one command."""

from __future__ import annotations

from tandem.commands.supervise import supervised
from tandem.config import ClusterConfig
from tandem.console import Console
from tandem.local_cluster import start_cluster
from tandem.model_folder import find_model
from tandem.processes import ChildProcesses
from tandem.supervisor import Supervisor, Unit


def run_serve(model: str, config: ClusterConfig) -> int:
    """Serve until stopped, and start anew what dies; returns the exit code."""

    def body(children: ChildProcesses, console: Console) -> int:
        folder = find_model(model, config.model.served_model_name)
        children.warm()
        with console:
            cluster = start_cluster(children, config, folder, console)
        url = f"{config.http.scheme}://{cluster.router.http}"
        console.panel(
            [
                f"[bold]{folder.name}[/bold] is served at [bold cyan]{url}/v1[/bold cyan]",
                "Ctrl-C stops everything",
            ],
            f"curl {url}/v1/completions -H 'Content-Type: application/json'"
            f' -d \'{{"model": "{folder.name}", "prompt": "Hello", "max_tokens": 16}}\'',
        )
        console.url(url)
        units: list[Unit] = [cluster.router, *cluster.engines]
        seconds = config.time.start_timeout
        Supervisor(children, units, console.echo, seconds, ends_with=cluster.engines).run()
        return 0

    return supervised(body)

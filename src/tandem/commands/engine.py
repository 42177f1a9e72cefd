"""`tandem engine`: this node's part of one engine."""

from __future__ import annotations

from tandem.commands.supervise import supervised, wait_forever
from tandem.config import EngineConfig
from tandem.console import Console
from tandem.local_cluster import start_engines, wait_ready
from tandem.model_folder import find_model
from tandem.processes import ChildProcesses
from tandem.transfer.transports.registry import connector_name
from tandem.wire.keys import NO_KEY, load_key

ERROR_SECONDS = 15.0
"""Beyond the start timeout: an error of the ranks says more than that the start took too long."""


def run_engine(model: str, config: EngineConfig) -> int:
    """Run until stopped; returns the exit code."""
    folder = find_model(model, config.model.served_model_name)
    connector_name(config.network.connector)  # one that does not exist is an error before anything starts
    key = load_key(config.access.cluster_key_file)

    def body(children: ChildProcesses, console: Console) -> int:
        children.warm()
        if key is None:
            console.echo(f"{config.name}: {NO_KEY}")
        with console:
            [engine] = start_engines(children, [config], folder, config.network.router, key, console)
            if engine.leader is None:
                ranks = config.parallel.local_ranks
                console.echo(f"node {config.parallel.node_rank}: ranks {ranks.start} to {ranks.stop - 1} started")
            wait_ready(children, [engine], config.time.start_timeout + ERROR_SECONDS)
            engine.close()
            if engine.leader is None:
                console.echo(f"node {config.parallel.node_rank}: ready; node 0 tells when the engine is")
        wait_forever(children)
        return 0

    return supervised(body)

"""`tandem engine`: this node's part of one engine."""

from __future__ import annotations

import signal

from tandem.commands.supervise import StopSignal, supervised, wait_forever
from tandem.config import EngineConfig
from tandem.console import Console
from tandem.engine.start.launch import EngineProcesses
from tandem.local_cluster import start_engines, wait_ready
from tandem.model_folder import find_model
from tandem.processes import ChildProcesses
from tandem.reports import DRAIN_SIGNAL
from tandem.transfer.transports.registry import connector_name
from tandem.wire.keys import NO_KEY, load_key

LAST_SECONDS = 3.0
"""Beyond its --drain-timeout, for an engine to end in good order."""
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
        try:
            wait_forever(children)
        except StopSignal as stop:
            if stop.number == signal.SIGTERM:
                drain(engine, config.drain_timeout, console)
            raise
        return 0

    return supervised(body)


def drain(engine: EngineProcesses, seconds: float, console: Console) -> None:
    """Let an engine finish what it has; returns once it has, after `seconds`, or when a second signal has ended it."""
    console.echo(
        f"{engine.name}: takes no new requests and ends when it has done those that it has, within {seconds:.0f} s;"
        " a second SIGTERM or Ctrl-C ends it at once"
    )
    if engine.leader is not None:
        engine.leader.send_signal(DRAIN_SIGNAL)
    engine.ranks[0].join(seconds + LAST_SECONDS)  # on other nodes the ranks follow the leader, which drains too

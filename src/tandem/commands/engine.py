"""`tandem engine`: this node's part of one engine."""

from __future__ import annotations

from tandem.commands.console import Console
from tandem.commands.supervise import supervised, wait_forever
from tandem.config import EngineConfig
from tandem.local_cluster import Progress, start_engines, wait_ready
from tandem.processes import ChildProcesses

LAST_WORDS_SECONDS = 15.0
"""What ranks have to say about a start that fails is better than that it took too long."""


def run_engine(config: EngineConfig) -> int:
    def body(family: ChildProcesses, console: Console) -> int:
        family.warm()
        name = config.engine_id or config.role
        with console:
            [engine] = start_engines(family, [(name, config)], config.network.router)
            progress = Progress(console.loaded, lambda who, status: console.ready(who, status, engine.http))
            if engine.leader is None:
                ranks = config.parallel.local_ranks
                console.echo(f"node {config.parallel.node_rank}: ranks {ranks.start} to {ranks.stop - 1} started")
            wait_ready(family, [engine], config.time.start_timeout + LAST_WORDS_SECONDS, progress)
            if engine.leader is None:
                console.echo(f"node {config.parallel.node_rank}: ready; node 0 tells when the engine is")
        wait_forever(family)
        return 0

    return supervised(body)

"""`tandem doctor`: says what to mend on a machine, between the nodes of an engine, among the engines of a router."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tandem.commands.doctor_options import DoctorOptions
from tandem.config import ParallelSection
from tandem.doctor.deadline import within
from tandem.doctor.engines import EngineView, fetch_engines, fetch_health
from tandem.doctor.finding import Finding, Level, any_problem
from tandem.doctor.pairs import SHORT, Pair, PairState, no_path, pairs
from tandem.errors import ConfigError

if TYPE_CHECKING:
    from tandem.doctor.cluster import ClusterPlan, ClusterResult

STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
PLAIN_WIDTH = 160
CHECK_SECONDS = 15.0
TORCH_SECONDS = 90.0


def run_doctor(options: DoctorOptions) -> int:
    """The exit code. Raises ConfigError for flags that do not go together, StartError as an engine's start would."""
    cluster = options.master is not None or options.nnodes > 1
    if options.url is not None and cluster:
        raise ConfigError("--url asks a running router, --master checks nodes: give one of them")
    if options.url is not None:
        return doctor_router(options.url, options.api_key)
    if not cluster:
        return doctor_machine(options.host, options.cluster_key_file)
    if options.nnodes < 2:
        raise ConfigError("--master is where the nodes of an engine meet: say how many with --nnodes, 2 or more")
    return doctor_cluster(_cluster_plan(options))


def _cluster_plan(options: DoctorOptions) -> ClusterPlan:
    # Before torch is imported: its stack traces would hide the one line that counts.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from tandem.doctor.cluster import ClusterPlan
    from tandem.transfer.transports.registry import connector_name

    tp = options.tp if options.tp is not None else max(1, options.nnodes // max(1, options.pp))
    return ClusterPlan(
        ParallelSection(tp, options.pp, options.nnodes, options.node_rank, options.master),
        connector_name(options.connector),
        options.engine_id,
        options.host,
        options.cluster_key_file,
        options.start_timeout,
        options.device,
    )


def doctor_machine(host: str | None, key_file: Path | None) -> int:
    """This machine alone."""
    from tandem.doctor.machine import check_machine
    from tandem.doctor.network import check_network
    from tandem.doctor.software import PROBE_SECONDS, check_key, check_nixl, check_torch, check_versions

    findings = [
        *within(CHECK_SECONDS, "versions", check_versions),
        *within(TORCH_SECONDS, "torch", check_torch),
        *within(PROBE_SECONDS + CHECK_SECONDS, "nixl", check_nixl),
        *within(CHECK_SECONDS, "machine", check_machine),
        *within(CHECK_SECONDS, "network", lambda: check_network(host)),
        *within(CHECK_SECONDS, "cluster key", lambda: check_key(key_file)),
    ]
    console = _console()
    console.print(_findings_table(findings))
    counts = {level: sum(finding.level is level for finding in findings) for level in Level}
    console.print(f"{len(findings)} looked at: {counts[Level.PROBLEM]} problems, {counts[Level.WARNING]} warnings")
    return int(any_problem(findings))


def doctor_cluster(plan: ClusterPlan) -> int:
    """The nodes of an engine; the table is on node 0."""
    from tandem.doctor.cluster import check_cluster

    result = check_cluster(plan, lambda line: print(line, file=sys.stderr, flush=True))
    if result.own == 0:
        _print_cluster(result, plan.connector)
    else:
        if result.own in result.errors:
            print(f"tandem: {result.errors[result.own]}", file=sys.stderr)
        mine = [reach for reach in result.reach if reach.reader == result.own]
        good = sum(reach.error is None for reach in mine)
        print(f"node {result.own}: reaches {good} of {len(mine)} nodes over {plan.connector}; node 0 shows the table")
    return 0 if result.good else 1


def doctor_router(url: str, api_key: str | None) -> int:
    """The engines of a running router."""
    engines = fetch_engines(url, api_key)
    found = pairs(engines)
    console = _console()
    console.print(_engines_table(engines))
    if found:
        console.print(_pairs_table(found))
    why = no_path(engines, found)
    if why is not None:
        console.print(f"[bold red]no request can be served:[/] {escape(why)}")
    elif (unhealthy := fetch_health(url, api_key)) is not None:
        console.print(f"[bold red]the router is not ready:[/] {escape(unhealthy)}")
        return 1
    bad = sum(pair.state in (PairState.REFUSED, PairState.LOST) for pair in found)
    console.print(f"{len(engines)} engines, {len(found)} pairs of prefill and decode, {bad} refused or lost")
    return int(bad > 0 or why is not None)


def _console() -> Console:
    """Results go to stdout; wide where it is no terminal, so that nothing is cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _findings_table(findings: Sequence[Finding]) -> Table:
    table = Table("", "what", "found", "what to do", title="this machine", title_justify="left")
    for finding in findings:
        style = STYLES[finding.level]
        table.add_row(
            f"[{style}]{finding.level.value}[/]",
            escape(finding.what),
            escape(finding.found),
            escape(finding.advice or ""),
        )
    return table


def _print_cluster(result: ClusterResult, connector: str) -> None:
    from tandem.doctor.reach_advice import advice, clock_skew, shared_machines

    console = _console()
    table = Table("reader", "reads from", "ping ms", "read ms", "GB/s", "", "what to do", title_justify="left")
    table.title = f"who reaches whom over {connector}"
    for reach in result.reach:
        state = "[green]ok[/]" if reach.speed is not None else "[yellow]answers, not read from[/]"
        if reach.error is not None:
            state = f"[bold red]{escape(reach.error)}[/]"
        table.add_row(
            str(result.nodes[reach.reader]),
            str(result.nodes[reach.source]),
            _number(reach.ping, 1e3),
            _number(reach.latency, 1e3),
            _number(reach.speed, 1e-9),
            state,
            escape(advice(reach, result.nodes, connector) or ""),
        )
    console.print(table)
    for node, error in result.errors.items():
        console.print(f"[bold red]{result.nodes[node]}:[/] {escape(error)}")
    if result.keys_differ is not None:
        console.print(f"[bold red]the cluster keys differ:[/] {result.keys_differ}; copy one file to every node")
    for remark in (clock_skew(result.nodes, result.clocks), shared_machines(result.nodes)):
        if remark is not None:
            console.print(f"[yellow]{remark}[/]")
    if result.all_reduce is not None:
        console.print(f"a sum of 1 MiB over all nodes takes {result.all_reduce * 1e3:.1f} ms")


def _number(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:.2f}"


def _engines_table(engines: Sequence[EngineView]) -> Table:
    table = Table("engine", "role", "state", "shape", "nodes", "connector", "dtype", "model", "fingerprint", "version")
    for engine in engines:
        table.add_row(
            escape(engine.engine_id),
            escape(engine.role),
            f"[{'green' if engine.ready else 'bold red'}]{escape(engine.state)}[/]",
            f"tp {engine.tp} pp {engine.pp}",
            escape(", ".join(engine.nodes)) or str(engine.nnodes),
            escape(engine.connector),
            escape(engine.dtype),
            escape(engine.model),
            escape(engine.fingerprint[:SHORT]),
            escape(engine.version),
        )
    return table


def _pairs_table(found: Sequence[Pair]) -> Table:
    styles = {PairState.READY: "green", PairState.WAITING: "yellow"}
    table = Table("prefill", "decode", "", "why", "what to do")
    for pair in found:
        table.add_row(
            escape(pair.prefill.engine_id),
            escape(pair.decode.engine_id),
            f"[{styles.get(pair.state, 'bold red')}]{pair.state.value}[/]",
            escape(pair.why or ""),
            escape(pair.advice or ""),
        )
    return table

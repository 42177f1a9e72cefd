"""`tandem doctor`: says what to mend on a machine, between the nodes of an engine, among the engines of a router."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tandem.client import Client
from tandem.commands.doctor_options import DoctorOptions
from tandem.commands.listed_engines import listed_engines
from tandem.config import EngineConfig
from tandem.doctor.engine_pairs import SHORT, ListedEngine, Pair, PairState, engine_pairs, why_unserved
from tandem.doctor.findings import Level, any_problem, run_check
from tandem.errors import ConfigError, RequestError, StartError, Unavailable

if TYPE_CHECKING:
    from tandem.doctor.cluster import ClusterReport

PLAIN_WIDTH = 160
CHECK_SECONDS = 15.0
TORCH_SECONDS = 90.0
FETCH_SECONDS = 10.0
GOOD, DOUBTFUL, BAD = "green", "yellow", "bold red"
LEVEL_STYLES = {Level.OK: GOOD, Level.WARNING: DOUBTFUL, Level.PROBLEM: BAD}
PAIR_STYLES = {PairState.READY: GOOD, PairState.WAITING: DOUBTFUL}


def run_doctor(options: DoctorOptions) -> int:
    """Return the exit code.

    Raises ConfigError for flags that do not go together, StartError as an engine's start would.
    """
    cluster = options.master is not None or options.nnodes > 1
    if options.url is not None and cluster:
        raise ConfigError("--url asks a running router, --master checks nodes: give one of them")
    if options.url is not None:
        return doctor_router(options.url, options.api_key)
    if not cluster:
        return doctor_machine(options.host, options.cluster_key_file)
    if options.nnodes < 2:
        raise ConfigError("--master is where the nodes of an engine meet: say how many with --nnodes, 2 or more")
    return doctor_cluster(options.engine_config())


def doctor_machine(host: str | None, key_file: Path | None) -> int:
    """Check this machine alone."""
    from tandem.doctor.machine import check_machine, check_network
    from tandem.doctor.software import PROBE_SECONDS, check_key, check_nixl, check_torch, check_versions

    findings = [
        *run_check(CHECK_SECONDS, "versions", check_versions),
        *run_check(TORCH_SECONDS, "torch", check_torch),
        *run_check(PROBE_SECONDS + CHECK_SECONDS, "nixl", check_nixl),
        *run_check(CHECK_SECONDS, "machine", check_machine),
        *run_check(CHECK_SECONDS, "network", lambda: check_network(host)),
        *run_check(CHECK_SECONDS, "cluster key", lambda: check_key(key_file)),
    ]
    rows = [(Text(f.level.value, LEVEL_STYLES[f.level]), f.what, f.found, f.advice or "") for f in findings]
    _print_table(("", "what", "found", "what to do"), rows, title="this machine")
    problems, warnings = (sum(f.level is level for f in findings) for level in (Level.PROBLEM, Level.WARNING))
    print(f"{len(findings)} looked at: {problems} problems, {warnings} warnings")
    return int(any_problem(findings))


def doctor_cluster(config: EngineConfig) -> int:
    """Check the nodes of an engine; the table is on node 0."""
    # Before torch is imported: its stack traces would hide the one line that counts.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from tandem.doctor.cluster import ClusterCheck

    check = ClusterCheck(config)
    report = check.run(lambda line: print(line, file=sys.stderr, flush=True))
    if check.own == 0:
        _print_cluster(report, check.connector)
    else:
        if check.own in report.errors:
            print(f"tandem: {report.errors[check.own]}", file=sys.stderr)
        mine = [link for link in report.links if link.reader == check.own]
        good = sum(link.error is None for link in mine)
        print(f"node {check.own}: reaches {good} of {len(mine)} nodes over {check.connector}; node 0 shows the table")
    return 0 if report.good else 1


def doctor_router(url: str, api_key: str | None) -> int:
    """Check the engines of a running router."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url must be like http://HOST:8000; got {url!r}")
    engines, unhealthy = asyncio.run(_ask_router(url, api_key))
    pairs = engine_pairs(engines)
    _print_engines(engines, pairs)
    console, why = _console(), why_unserved(engines, pairs)
    if why is not None:
        console.print(f"[bold red]no request can be served:[/] {escape(why)}")
    elif unhealthy is not None:
        console.print(f"[bold red]the router is not ready:[/] {escape(unhealthy)}")
        return 1
    bad = sum(pair.state in (PairState.REFUSED, PairState.LOST) for pair in pairs)
    print(f"{len(engines)} engines, {len(pairs)} pairs of prefill and decode, {bad} refused or lost")
    return int(bad > 0 or why is not None)


async def _ask_router(url: str, api_key: str | None) -> tuple[list[ListedEngine], str | None]:
    """Return the router's engines, and in its own words why it cannot serve a request, if it says so.

    Raises StartError where no router answers, ConfigError for a URL or key that cannot work, WireError for another
    answer than a router's.
    """
    try:
        async with asyncio.timeout(FETCH_SECONDS), Client(url, api_key=api_key) as client:
            engines = await listed_engines(client)
            with suppress(RequestError):
                return engines, await client.unhealthy()
            return engines, None
    except (TimeoutError, Unavailable) as error:
        raise StartError(
            f"no router answers at {url} ({error or f'not in {FETCH_SECONDS:.0f} s'}): is it started, is this its API's"
            " address, is there a firewall?"
        ) from None


# --- tables ----------------------------------------------------------------------------------------------------------


def _console() -> Console:
    """Print results to stdout; wide where it is no terminal, so that nothing is cut."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def _print_table(headers: Iterable[str], rows: Iterable[tuple[str | Text, ...]], title: str | None = None) -> None:
    table = Table(*headers, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    _console().print(table)


def _print_engines(engines: Sequence[ListedEngine], pairs: Sequence[Pair]) -> None:
    headers = ("engine", "role", "state", "shape", "nodes", "connector", "dtype", "model", "fingerprint", "version")
    engine_rows = (
        (e.engine_id, e.role, Text(e.state, GOOD if e.ready else BAD), f"tp {e.tp} pp {e.pp}",
         ", ".join(e.nodes) or str(e.nnodes), e.connector, e.dtype, e.model, e.fingerprint[:SHORT], e.version)
        for e in engines
    )  # fmt: skip
    _print_table(headers, engine_rows)
    pair_rows = [
        (p.prefill.engine_id, p.decode.engine_id, Text(p.state.value, PAIR_STYLES.get(p.state, BAD)), p.why, p.advice)
        for p in pairs
    ]
    if pair_rows:
        _print_table(("prefill", "decode", "", "why", "what to do"), pair_rows)


def _print_cluster(report: ClusterReport, connector: str) -> None:
    from tandem.doctor.links import clock_skew, key_difference, link_advice, shared_machines

    console, nodes = _console(), report.nodes
    rows = []
    for link in report.links:
        state = Text("ok", GOOD) if link.speed is not None else Text("answers, not read from", DOUBTFUL)
        if link.error is not None:
            state = Text(link.error, BAD)
        numbers = (_number(link.ping, 1e3), _number(link.latency, 1e3), _number(link.speed, 1e-9))
        advice = link_advice(link, nodes, connector)
        rows.append((str(nodes[link.reader]), str(nodes[link.source]), *numbers, state, advice))
    headers = ("reader", "reads from", "ping ms", "read ms", "GB/s", "", "what to do")
    _print_table(headers, rows, title=f"who reaches whom over {connector}")
    for node, error in report.errors.items():
        console.print(f"[bold red]{nodes[node]}:[/] {escape(error)}")
    if (difference := key_difference(nodes)) is not None:
        console.print(f"[bold red]the cluster keys differ:[/] {difference}; copy one file to every node")
    for remark in (clock_skew(nodes, report.clocks), shared_machines(nodes)):
        if remark is not None:
            console.print(f"[yellow]{remark}[/]")
    if report.all_reduce is not None:
        console.print(f"a sum of 1 MiB over all nodes takes {report.all_reduce * 1e3:.1f} ms")


def _number(value: float | None, factor: float) -> str:
    return "" if value is None else f"{value * factor:.2f}"

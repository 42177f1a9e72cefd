"""`tandem doctor --master` between nodes that share nothing but a switch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nodes import Lab, Process, lab

PORT = 29561
SECONDS = 150
# The namespaces share a kernel, so that UCX would read the other process's memory straight away.
OVER_THE_SWITCH = {"UCX_TLS": "tcp"}
ROW = re.compile(r"node (\d) \(.*?\).*node (\d) \(.*?\)\s*│\s*([\d.]+)\s*│\s*([\d.]+)\s*│\s*([\d.]+)\s*│ ok")


def start(made: Lab, key: Path, *each: list[str], common: tuple[str, ...] = ()) -> list[Process]:
    """One doctor per node; `each`: flags of one node alone."""
    flags = [
        "--master", f"{made.nodes[0].address}:{PORT}", "--nnodes", str(len(made.nodes)), "--cluster-key-file", str(key),
        "--start-timeout", "90", *common,
    ]  # fmt: skip
    command = [sys.executable, "-c", "from tandem.cli import main; main()", "doctor", *flags]
    own = each or tuple([] for _ in made.nodes)
    return [
        node.run(*command, "--node-rank", str(rank), *own[rank], env=OVER_THE_SWITCH)
        for rank, node in enumerate(made.nodes)
    ]


@pytest.mark.netns
@pytest.mark.parametrize("connector", ["nixl", "tcp"])
def test_all_nodes_read_from_each_other_and_node_0_shows_how_fast(connector: str, key: Path) -> None:
    with lab(2) as made:
        processes = start(made, key, common=("--connector", connector))
        codes = [process.wait(SECONDS) for process in processes]
        assert codes == [0, 0], made.logs
        rows = ROW.findall(processes[0].output)
        assert [(reader, source) for reader, source, *_ in rows] == [("0", "1"), ("1", "0")], made.logs
        assert all(float(speed) > 0 for *_, speed in rows)
        assert "reaches 1 of 1 nodes" in processes[1].output


@pytest.mark.netns
def test_nodes_that_disagree_get_the_error_of_an_engines_start(key: Path) -> None:
    with lab(2) as made:
        processes = start(made, key, ["--engine-id", "a"], ["--engine-id", "b"])
        assert [process.wait(SECONDS) for process in processes] == [1, 1], made.logs
        for process in processes:
            assert "disagree on engine_id" in process.output


@pytest.mark.netns
def test_two_of_three_nodes_that_cannot_reach_each_other_are_named(key: Path) -> None:
    with lab(3) as made:
        for here, there in ((1, 2), (2, 1)):
            route = ["route", "add", "blackhole", f"{made.nodes[there].address}/32"]
            subprocess.run(["ip", "-n", made.nodes[here].namespace, *route], check=True)
        processes = start(made, key)
        assert [process.wait(SECONDS) for process in processes] == [1, 1, 1], made.logs
        table = processes[0].output
        assert f"no answer from {made.nodes[2].address}" in table, made.logs
        assert "firewall" in table
        assert f"no answer from {made.nodes[0].address}" not in table

"""Nodes that cannot form an engine say so, on every node, in one sentence, in bounded time."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tandem.wire.keys import new_key_file
from tests.support.nodes import Lab, Node, Process, lab, write_hosts

PORT = 29601


def start(node: Node, rank: int, nnodes: int, master: str, model: Path, key: Path, *flags: str) -> Process:
    shape = [] if "--tp" in flags else ["--tp", "2"]
    return node.tandem(
        "engine", str(model), "--role", "mixed", "--nnodes", str(nnodes), "--node-rank", str(rank),
        "--master", f"{master}:{PORT}", "--cluster-key-file", str(key), "--kv-memory", "1MiB", "--threads", "1",
        "--served-model-name", "random", *shape, *flags,
    )  # fmt: skip


def errors(made: Lab, processes: list[Process], seconds: float = 60) -> list[str]:
    """The one line that each process ends with; none may end well or leave a traceback."""
    found = []
    for process in processes:
        assert process.wait(seconds) == 1, made.logs
        assert "Traceback" not in process.output, process.output
        lines = [line for line in process.output.splitlines() if line.startswith("tandem: ")]
        assert len(lines) == 1, process.output
        found.append(lines[0])
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("field", "first", "second", "values"),
    [
        ("engine_id", ["--engine-id", "left"], ["--engine-id", "right"], ("left", "right")),
        ("engine_id", [], ["--engine-id", "right"], ("none", "right")),
        ("tp", ["--tp", "2"], ["--tp", "4"], ("2", "4")),
        ("dtype", ["--dtype", "float32"], ["--dtype", "bfloat16"], ("float32", "bfloat16")),
        ("block_size", ["--block-size", "16"], ["--block-size", "32"], ("16", "32")),
        ("connector", ["--connector", "nixl"], ["--connector", "tcp"], ("nixl", "tcp")),
    ],
)
def test_both_nodes_name_the_field_and_both_values(
    model: Path, key: Path, field: str, first: list[str], second: list[str], values: tuple[str, str]
) -> None:
    with lab(2) as made:
        a, b = made.nodes
        processes = [
            start(a, 0, 2, a.address, model, key, *first),
            start(b, 1, 2, a.address, model, key, *second),
        ]
        for line in errors(made, processes):
            assert f"disagree on {field}" in line
            assert all(value in line for value in values)
            assert a.address in line
            assert b.address in line


@pytest.mark.timeout(200)
def test_different_models_are_told_apart_by_their_weights(model: Path, other_model: Path, key: Path) -> None:
    with lab(2) as made:
        a, b = made.nodes
        processes = [start(a, 0, 2, a.address, model, key), start(b, 1, 2, a.address, other_model, key)]
        assert all("disagree on fingerprint" in line for line in errors(made, processes))


@pytest.mark.timeout(200)
def test_different_cluster_keys_are_told_apart_before_anything_is_refused(
    model: Path, key: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.key"
    new_key_file(other)
    with lab(2) as made:
        a, b = made.nodes
        processes = [start(a, 0, 2, a.address, model, key), start(b, 1, 2, a.address, model, other)]
        assert all("disagree on cluster_key" in line for line in errors(made, processes))


@pytest.mark.timeout(200)
def test_a_node_that_never_comes_is_named_by_those_that_did(model: Path, key: Path) -> None:
    with lab(3) as made:
        a, b, _ = made.nodes
        flags = ["--start-timeout", "8", "--tp", "3"]
        processes = [
            start(a, 0, 3, a.address, model, key, *flags),
            start(b, 1, 3, a.address, model, key, *flags),
        ]
        for line in errors(made, processes):
            assert "rank 2 of node 2 did not come within" in line
            assert a.address in line
            assert b.address in line


@pytest.mark.timeout(200)
def test_two_nodes_with_one_rank_are_both_named(model: Path, key: Path) -> None:
    with lab(2) as made:
        a, b = made.nodes
        processes = [
            start(a, 0, 2, a.address, model, key, "--start-timeout", "30"),
            start(b, 1, 2, a.address, model, key, "--start-timeout", "30"),
        ]
        made.until(lambda: "started" in processes[1].output, 30, "the second node starts")
        processes.append(start(b, 1, 2, a.address, model, key, "--start-timeout", "30"))
        # The twin comes either before the engine is whole, and ends it, or after, and ends alone.
        assert processes[2].wait(90) == 1, made.logs


@pytest.mark.timeout(200)
def test_an_unreachable_master_ends_the_start_at_the_deadline(model: Path, key: Path) -> None:
    with lab(2) as made:
        _, b = made.nodes
        process = start(b, 1, 2, "10.201.77.99", model, key, "--start-timeout", "5")
        [line] = errors(made, [process])
        assert f"--master 10.201.77.99:{PORT} could not be reached within 5 s" in line


@pytest.mark.timeout(200)
def test_another_program_at_the_master_port_ends_the_start_at_the_deadline(model: Path, key: Path) -> None:
    """It takes the connection and never says a word."""
    with lab(2) as made:
        a, b = made.nodes
        listen = (
            f"import socket, time; s = socket.create_server(('', {PORT})); print('here', flush=True); time.sleep(100)"
        )
        other = a.run(sys.executable, "-c", listen)
        made.until(lambda: "here" in other.output, 30, "the other program listens")
        [line] = errors(made, [start(b, 1, 2, a.address, model, key, "--start-timeout", "5")])
        assert "something listens there, but no meeting of ranks within 5 s" in line


@pytest.mark.timeout(200)
def test_a_host_name_that_is_loopback_on_node_0_still_gives_a_reachable_address(model: Path, key: Path) -> None:
    with lab(2) as made:
        a, b = made.nodes
        write_hosts(a, {"node-0": "127.0.1.1", "node-1": b.address})
        processes = [start(a, 0, 2, "node-0", model, key), start(b, 1, 2, "node-0", model, key)]
        made.until(lambda: "ready" in processes[0].output, 120, "the engine is ready")


@pytest.mark.timeout(200)
def test_a_host_name_that_is_loopback_elsewhere_says_what_to_set(model: Path, key: Path) -> None:
    with lab(2) as made:
        a, b = made.nodes
        write_hosts(b, {"node-0": "127.0.1.1"})
        [line] = errors(made, [start(b, 1, 2, "node-0", model, key)])
        assert "set --master to node 0's address" in line
        [line] = errors(made, [start(a, 0, 2, a.address, model, key, "--host", "127.0.0.1")])
        assert "--host" in line
        assert a.address in line

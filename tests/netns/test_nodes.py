"""Engines that span nodes hand their KV to engines of other shapes on other nodes, with no engine id given."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nodes import Lab, Node, lab
from tests.support.reference import greedy

MASTER_PORT = 29501
CONTROL_PORT = 27000
HTTP_PORT = 28000
START_SECONDS = 240

STREAM = (
    "import sys, urllib.request\n"
    "url, body = sys.argv[1:]\n"
    "request = urllib.request.Request(url, data=body.encode(), headers={'Content-Type': 'application/json'})\n"
    "for line in urllib.request.urlopen(request, timeout=60):\n"
    "    print(line.decode(), flush=True)\n"
)


def start_router(node: Node, key: Path) -> None:
    node.tandem(
        "router", "--host", node.address, "--port", str(HTTP_PORT), "--control-port", str(CONTROL_PORT),
        "--cluster-key-file", str(key),
    )  # fmt: skip


def start_engine(
    nodes: list[Node], router: Node, model: Path, key: Path, *flags: str, port: int = MASTER_PORT, threads: int = 1
) -> None:
    """One engine over these nodes."""
    for rank, node in enumerate(nodes):
        master = ["--master", f"{nodes[0].address}:{port}"] if len(nodes) > 1 else ["--host", node.address]
        node.tandem(
            "engine", str(model), "--nnodes", str(len(nodes)), "--node-rank", str(rank), *master,
            "--router", f"{router.address}:{CONTROL_PORT}", "--cluster-key-file", str(key),
            "--kv-memory", "4MiB", "--threads", str(threads), "--start-timeout", str(START_SECONDS), *flags,
        )  # fmt: skip


def wait_healthy(made: Lab, router: Node) -> None:
    url = f"http://{router.address}:{HTTP_PORT}/health"
    made.until(lambda: router.ask(url)[1].get("detail") == "ready", START_SECONDS, "the router has no whole path")


def complete(router: Node, tokens: list[int], count: int) -> dict[str, object]:
    status, answer = router.ask(
        f"http://{router.address}:{HTTP_PORT}/v1/completions",
        {
            "prompt": tokens,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    assert status == 200, answer
    return answer  # type: ignore[no-any-return]


def stream(node: Node) -> str:
    """Ask the engine whose node 0 this is for a long answer. Returns its URL once tokens come."""
    [url] = re.findall(r"API (http://\S+)", node.processes[0].output)
    body = {"prompt": [5, 6, 7], "max_tokens": 4_000, "ignore_eos": True, "stream": True}
    client = node.run(sys.executable, "-c", STREAM, f"{url}/v1/completions", json.dumps(body))
    node.lab.until(lambda: "data:" in client.output, 60, "tokens come")
    return str(url)


def check_answers(router: Node, model: Path) -> None:
    for length in (1, 40, 100):
        tokens = [random.Random(length).randrange(3, 250) for _ in range(length)]
        answer = complete(router, tokens, 6)
        assert answer["choices"][0]["token_ids"] == greedy(model, tokens, 6)  # type: ignore[index]
        assert answer["tandem"]["disaggregated"], answer["tandem"]  # type: ignore[index]


def check_identity(router: Node, sizes: dict[str, int]) -> None:
    """Every rank of every engine shows the one identity of its engine, made up because none was configured."""
    _, answer = router.ask(f"http://{router.address}:{HTTP_PORT}/tandem/engines")
    for engine in answer["engines"]:
        assert len(engine["ranks"]) == sizes[engine["role"]]
        assert {(r["engine_id"], r["incarnation"]) for r in engine["ranks"]} == {
            (engine["engine_id"], engine["incarnation"])
        }
        assert engine["engine_id"].startswith("engine-")


@pytest.mark.timeout(600)
def test_tp16_over_two_nodes_prefills_for_tp4_on_a_third(model: Path, key: Path) -> None:
    with lab(3) as made:
        a, b, c = made.nodes
        start_router(c, key)
        start_engine([a, b], c, model, key, "--role", "prefill", "--tp", "16")
        start_engine([c], c, model, key, "--role", "decode", "--tp", "4")
        wait_healthy(made, c)
        check_answers(c, model)
        check_identity(c, {"prefill": 16, "decode": 4})


@pytest.mark.timeout(600)
@pytest.mark.parametrize("connector", ["nixl", "tcp"])
def test_tp4_pp2_over_two_nodes_prefills_for_tp8_over_the_same_nodes(model: Path, key: Path, connector: str) -> None:
    with lab(2) as made:
        a, b = made.nodes
        start_router(a, key)
        start_engine([a, b], a, model, key, "--role", "prefill", "--tp", "4", "--pp", "2", "--connector", connector)
        start_engine(
            [a, b], a, model, key, "--role", "decode", "--tp", "8", "--connector", connector, port=MASTER_PORT + 1
        )
        wait_healthy(made, a)
        check_answers(a, model)
        check_identity(a, {"prefill": 8, "decode": 8})


@pytest.mark.timeout(200)
@pytest.mark.parametrize("lost", [0, 1])
def test_an_engine_that_loses_a_node_ends_on_the_other_one_too(model: Path, key: Path, lost: int) -> None:
    with lab(2) as made:
        nodes = made.nodes
        start_engine(nodes, nodes[0], model, key, "--role", "mixed", "--tp", "2")
        made.until(lambda: "ready" in nodes[0].processes[0].output, START_SECONDS, "the engine is ready")
        nodes[lost].processes[0].popen.kill()
        survivor = nodes[1 - lost].processes[0]
        assert survivor.wait(60) == 1
        assert "of this engine was lost" in survivor.output


@pytest.mark.timeout(200)
def test_nodes_that_cannot_reach_each_other_any_more_end_their_engine_amid_a_step(model: Path, key: Path) -> None:
    """No packet tells of it, and the ranks wait for each other in a collective."""
    with lab(2) as made:
        first, second = made.nodes
        start_engine(made.nodes, first, model, key, "--role", "mixed", "--tp", "2")
        made.until(lambda: "ready" in first.processes[0].output, START_SECONDS, "the engine is ready")
        stream(first)
        subprocess.run(["ip", "-n", second.namespace, "link", "set", "eth0", "down"], check=True)
        for process in (first.processes[0], second.processes[0]):
            assert process.wait(60) == 1
            assert "of this engine was lost" in process.output


@pytest.mark.timeout(200)
def test_ctrl_c_on_node_0_ends_the_other_nodes_in_good_order(model: Path, key: Path) -> None:
    with lab(2) as made:
        first, second = made.nodes
        start_engine(made.nodes, first, model, key, "--role", "mixed", "--tp", "2")
        made.until(lambda: "ready" in first.processes[0].output, START_SECONDS, "the engine is ready")
        first.processes[0].popen.send_signal(signal.SIGINT)
        assert first.processes[0].wait(30) == 0
        assert second.processes[0].wait(30) == 0, second.processes[0].output
        assert "the engine was ended on node 0: it was told to stop" in second.processes[0].output


@pytest.mark.timeout(200)
def test_a_rank_that_is_killed_amid_a_step_is_told_in_one_line_on_both_nodes(model: Path, key: Path) -> None:
    with lab(2) as made:
        first, second = made.nodes
        start_engine(made.nodes, first, model, key, "--role", "mixed", "--tp", "2")
        made.until(lambda: "ready" in first.processes[0].output, START_SECONDS, "the engine is ready")
        url = stream(first)
        ranks = first.ask(f"{url}/tandem/engine")[1]["ranks"]
        os.kill(ranks[1]["pid"], signal.SIGKILL)
        assert first.processes[0].wait(60) == 1
        assert second.processes[0].wait(60) == 1
        for node in (first, second):
            assert "Traceback" not in node.processes[0].output
        assert "tandem: rank 1 of this engine was lost" in first.processes[0].output

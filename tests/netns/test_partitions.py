"""The network falls apart under load and heals: every answer is right or a typed error, and nothing stays behind."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.nodes import Lab, Node, Process, lab
from tests.support.reference import greedy

HTTP_PORT = 28000
CONTROL_PORT = 27000
START_SECONDS = 240
NOTICED_SECONDS = 60
HEALED_SECONDS = 90
REQUEST_TIMEOUT = 60
TOKENS = 24
AMID = 6
"""Right answers that come while the network is parted."""

LOAD = """
import json, sys, threading, urllib.error, urllib.request
url, path, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
bodies, said, stop = json.load(open(path)), threading.Lock(), threading.Event()
def ask(number):
    request = urllib.request.Request(url, json.dumps(bodies[number]).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError as error:
        return 0, repr(error)
def client(first):
    number = first
    while not stop.is_set():
        status, body = ask(number)
        with said:
            print(json.dumps([number, status, body]), flush=True)
        number = (number + 3) % len(bodies)
        stop.wait(0.05)
clients = [threading.Thread(target=client, args=(first,)) for first in range(3)]
for one in clients:
    one.start()
sys.stdin.read()
stop.set()
"""
"""Three clients that ask again and again until its stdin ends; a line for each answer."""


@dataclass
class Cluster:
    """A prefill engine on node 1, decode engines "near" on node 0 and "far" on node 2; router and clients on node 0."""

    lab: Lab
    model: Path
    bodies: list[dict[str, Any]] = field(default_factory=list)
    right: list[list[int]] = field(default_factory=list)
    urls: dict[str, tuple[Node, str]] = field(default_factory=dict)

    def engines(self) -> dict[str, dict[str, Any]]:
        _, body = self.lab.nodes[0].ask(f"http://{self.lab.nodes[0].address}:{HTTP_PORT}/tandem/engines")
        return {engine["engine_id"]: engine for engine in body.get("engines", [])}

    def engine(self, name: str) -> dict[str, Any]:
        """What an engine says of itself, asked on its own node."""
        node, url = self.urls[name]
        return node.ask(f"{url}/tandem/engine")[1]  # type: ignore[no-any-return]

    def is_whole(self) -> bool:
        engines = self.engines()
        if {name: one["state"] for name, one in engines.items()} != dict.fromkeys(self.urls, "ready"):
            return False
        return all(self.has_session(name) for name in ("near", "far"))

    def has_session(self, name: str) -> bool:
        return [(peer["engine_id"], peer["state"]) for peer in self.engine(name)["peers"]] == [("prefill", "ready")]

    def held(self) -> dict[str, Any]:
        """What engines that have nothing to do still hold."""
        found: dict[str, Any] = {}
        for name in self.urls:
            engine = self.engine(name)
            kv, requests = engine["kv"], engine["requests"]
            idle = not any(requests[state] for state in ("waiting", "waiting_for_kv", "running"))
            if kv["leased"] or kv["in_use"] or kv["free"] + kv["cached"] != kv["blocks"] or not idle:
                found[name] = (kv, requests)
        return found

    def answers(self, load: Process) -> tuple[int, list[str]]:
        """How many answers were right, and which errors are not ours, wrong or late."""
        right, bad = 0, []
        for line in load.output.splitlines():
            number, status, body = json.loads(line)
            if status == 200 and body["choices"][0]["token_ids"] == self.right[number]:
                right += 1
            elif status == 200 or not isinstance(body, dict) or "code" not in body.get("error", {}):
                bad.append(line[:600])
        return right, bad


def start(made: Lab, model: Path, key: Path, connector: str) -> Cluster:
    near, middle, far = made.nodes
    cluster = Cluster(made, model)
    rng = random.Random(5)
    for length in (3, 40, 77, 100, 130, 180):
        prompt = [rng.randrange(3, 250) for _ in range(length)]
        fixed = {"max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        cluster.bodies.append({"prompt": prompt, **fixed})
        cluster.right.append(greedy(model, prompt, TOKENS))
    common = ("--cluster-key-file", str(key), "--lease-ttl", "2", "--request-timeout", str(REQUEST_TIMEOUT))
    ports = ("--host", near.address, "--port", str(HTTP_PORT), "--control-port", str(CONTROL_PORT))
    near.tandem("router", *ports, *common)
    for name, node, role in (("prefill", middle, "prefill"), ("near", near, "decode"), ("far", far, "decode")):
        engine = node.tandem(
            "engine", str(model), "--role", role, "--engine-id", name, "--host", node.address, "--connector", connector,
            "--router", f"{near.address}:{CONTROL_PORT}", "--kv-memory", "4MiB", "--threads", "1", *common,
        )  # fmt: skip
        made.until(partial(_has_said, engine, "API http"), START_SECONDS, f"{name} is ready")
        cluster.urls[name] = (node, engine.output.partition("API ")[2].split()[0])
    made.until(cluster.is_whole, START_SECONDS, "all engines are paired")
    return cluster


def _has_said(process: Process, text: str) -> bool:
    return text in process.output


def _part(one: Node, other: Node) -> None:
    """Drop all packets between two nodes: they go to a station that is not there."""
    for here, there in ((one, other), (other, one)):
        _ip(here, "neigh", "replace", there.address, "lladdr", "02:00:00:00:00:99", "nud", "permanent", "dev", "eth0")


def _heal(one: Node, other: Node) -> None:
    for here, there in ((one, other), (other, one)):
        _ip(here, "neigh", "del", there.address, "dev", "eth0")


def _ip(node: Node, *arguments: str) -> None:
    subprocess.run(["ip", "-n", node.namespace, *arguments], check=True)


@dataclass(frozen=True)
class Partition:
    """How the network falls apart, how that shows, and how it heals."""

    part: Callable[[Lab], None]
    shows: Callable[[Cluster], bool]
    heal: Callable[[Lab], None]


PARTITIONS = {
    "a decode engine's link is down": Partition(
        lambda made: _ip(made.nodes[2], "link", "set", "eth0", "down"),
        lambda cluster: cluster.engines()["far"]["state"] == "lost",
        lambda made: _ip(made.nodes[2], "link", "set", "eth0", "up"),
    ),
    "packets between router and decode engine are dropped": Partition(
        lambda made: _part(made.nodes[0], made.nodes[2]),
        lambda cluster: cluster.engines()["far"]["state"] == "lost",
        lambda made: _heal(made.nodes[0], made.nodes[2]),
    ),
    "packets between prefill and decode engine are dropped": Partition(
        lambda made: _part(made.nodes[1], made.nodes[2]),
        lambda cluster: not cluster.has_session("far"),
        lambda made: _heal(made.nodes[1], made.nodes[2]),
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("connector", ["nixl", "tcp"])
@pytest.mark.parametrize("name", PARTITIONS)
def test_a_partition_costs_no_answer_and_leaves_nothing(name: str, connector: str, model: Path, key: Path) -> None:
    partition = PARTITIONS[name]
    with lab(3) as made:
        cluster = start(made, model, key, connector)
        url = f"http://{made.nodes[0].address}:{HTTP_PORT}/v1/completions"
        bodies = made.folder / "bodies.json"
        bodies.write_text(json.dumps(cluster.bodies))
        load = made.nodes[0].run(sys.executable, "-c", LOAD, url, str(bodies), str(REQUEST_TIMEOUT + 10), talks=True)
        right = lambda: cluster.answers(load)[0]  # noqa: E731
        made.until(lambda: right() > 0, 60, "answers come")
        partition.part(made)
        made.until(lambda: partition.shows(cluster), NOTICED_SECONDS, "the partition is noticed")
        before = right()
        made.until(lambda: right() >= before + AMID, NOTICED_SECONDS, "answers come while the network is parted")
        partition.heal(made)
        made.until(cluster.is_whole, HEALED_SECONDS, "all engines are paired again")
        assert load.popen.stdin is not None
        load.popen.stdin.close()
        assert load.wait(REQUEST_TIMEOUT + 20) == 0, made.logs
        made.nodes[0].processes.remove(load)
        assert cluster.answers(load)[1] == []
        made.until(lambda: not cluster.held(), 30, "nothing is held")
        check_paths(cluster)


def check_paths(cluster: Cluster) -> None:
    """Both decode engines give right answers from the prefill engine's KV."""
    decoded = set()
    for _ in range(2):
        for body, right in zip(cluster.bodies, cluster.right, strict=True):
            status, answer = cluster.lab.nodes[0].ask(
                f"http://{cluster.lab.nodes[0].address}:{HTTP_PORT}/v1/completions", body
            )
            assert status == 200, answer
            assert answer["choices"][0]["token_ids"] == right
            assert answer["tandem"]["disaggregated"], answer["tandem"]
            decoded.add(answer["tandem"]["decode_engine"])
    assert decoded == {"near", "far"}

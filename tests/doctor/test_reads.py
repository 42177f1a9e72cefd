"""How nodes reach each other, with the nodes as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch._C import _distributed_c10d as stores

from tandem.doctor import door, reads
from tandem.doctor.board import Board
from tandem.doctor.cluster_messages import NodeDoor, NodeMemory, Pinged, Reach
from tandem.doctor.door import Door, knock
from tandem.doctor.reach_advice import advice, clock_skew, shared_machines
from tandem.doctor.reads import Node, all_pairs
from tandem.doctor.slab import Slab
from tandem.errors import StartError
from tandem.transfer.transports.base import Transport
from tandem.transfer.transports.registry import transport_factory
from tandem.wire.keys import ClusterKey, new_key

KIB = 1024


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "FIRST_BYTES", 512 * KIB)
    monkeypatch.setattr(reads, "BULK_BYTES", 1024 * KIB)


class Fellow:
    """A node with memory that the others can read."""

    def __init__(self, number: int) -> None:
        self.transport: Transport = transport_factory("tcp", None)(f"node-{number}", "127.0.0.1")
        self.slab = Slab(1024 * KIB, number, torch.device("cpu"))
        self.transport.register(self.slab.region)
        self.node = Node(self.transport, self.slab)
        self.memory = NodeMemory(number, self.transport.describe())


@pytest.fixture
def fellows() -> Iterator[list[Fellow]]:
    made = [Fellow(0), Fellow(1)]
    yield made
    for fellow in made:
        fellow.transport.close()


KNOWN = [Reach(0, 1), Reach(1, 0)]


def run_all(nodes: list[Node | None], memories: list[NodeMemory]) -> list[list[Reach]]:
    """What every node has found in the end; each in a thread of its own."""
    store = stores.HashStore()
    found: dict[int, list[Reach]] = {}

    def body(own: int) -> None:
        found[own] = all_pairs(nodes[own], own, memories, KNOWN, Board(store, own, 2))

    threads = [threading.Thread(target=body, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[0], found[1]]


def test_every_node_reads_from_every_other_and_all_know_the_results(fellows: list[Fellow]) -> None:
    first, second = run_all([f.node for f in fellows], [f.memory for f in fellows])
    assert first == second
    assert [(r.reader, r.source, r.error) for r in first] == [(0, 1, None), (1, 0, None)]
    assert all(r.latency and r.speed for r in first)


def test_a_node_that_is_not_ready_fails_its_pairs_alone(fellows: list[Fellow]) -> None:
    first, second = run_all([fellows[0].node, None], [fellows[0].memory, NodeMemory(1, error="no UCX")])
    assert first == second
    assert [r.step for r in first] == ["start", "start"]


def test_wrong_bytes_are_an_error(fellows: list[Fellow]) -> None:
    impostor = Slab(1024 * KIB, 7, torch.device("cpu"))
    fellows[1].slab._words.copy_(impostor._words)
    first, _ = run_all([f.node for f in fellows], [f.memory for f in fellows])
    assert "other bytes" in (first[0].error or "")
    assert first[1].error is None


def test_a_reader_that_falls_silent_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "TURN_SECONDS", 0.01)
    known = [Reach(1, 0), Reach(1, 2)]
    found = all_pairs(None, 0, [NodeMemory(n) for n in range(3)], known, Board(stores.HashStore(), 0, 3))
    assert [r.step for r in found] == ["reader", "reader"]


def test_a_node_that_says_nothing_is_named() -> None:
    with pytest.raises(StartError, match="node 1 fell silent"):
        Board(stores.HashStore(), 0, 2).exchange("pings", Pinged([]), 0.01)


def node_door(number: int, made: Door | None, key: str | None = None) -> NodeDoor:
    return NodeDoor(number, "127.0.0.1", "lo", "m", key, made.port if made else None)


def test_a_door_answers_those_who_hold_its_key_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "PING_SECONDS", 0.7)
    keys: list[ClusterKey] = [new_key(), new_key()]
    doors = [Door("127.0.0.1", keys[0]), Door("127.0.0.1", keys[0]), Door("127.0.0.1", keys[1])]
    described = [node_door(n, made, "ab"[n == 2]) for n, made in enumerate(doors)]
    described.append(node_door(3, None))
    found = {reach.source: reach for reach in knock(doors[0], 0, described)}
    for made in doors:
        made.close()
    assert found[1].error is None
    assert found[1].ping
    assert "no answer" in (found[2].error or "")
    assert "different cluster keys" in (advice(found[2], described, "nixl") or "")
    assert "does not listen" in (found[3].error or "")


def words(step: str, connector: str = "nixl", source: NodeDoor | None = None) -> str:
    nodes = [NodeDoor(0, "10.0.0.1", "eth0", "m0", "k"), source or NodeDoor(1, "10.0.0.2", "eth0", "m1", "k")]
    return advice(Reach(0, 1, error="x", step=step), nodes, connector) or ""


def test_what_to_do_follows_from_the_step_at_which_it_failed() -> None:
    assert "firewall" in words("connection")
    assert "--host" in words("connection", source=NodeDoor(1, "127.0.0.1", "lo", "m1", "k"))
    assert "UCX_NET_DEVICES=eth0" in words("read")
    assert "MTU" in words("read", "tcp")
    assert "node 0" in words("reader")


def test_clocks_that_are_apart_and_nodes_on_one_machine_are_remarked_on() -> None:
    nodes = [NodeDoor(0, "10.0.0.1", "eth0", "m0", "k"), NodeDoor(1, "10.0.0.2", "eth0", "m0", "k")]
    assert "60 s ahead" in (clock_skew(nodes, [100.0, 160.0]) or "")
    assert clock_skew(nodes, [100.0, 100.5]) is None
    assert "one machine" in (shared_machines(nodes) or "")
    assert shared_machines(nodes[:1]) is None

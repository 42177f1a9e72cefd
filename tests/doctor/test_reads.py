"""Reads between nodes, with the nodes as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not in __all__

from tandem.doctor import reads
from tandem.doctor.links import Link, NodeMemory, Step
from tandem.doctor.reads import ProbeMemory, ReadProbe, measure_all
from tandem.doctor.store_exchange import StoreExchange
from tandem.transfer.transports.base import Transport
from tandem.transfer.transports.registry import transport_factory

KIB = 1024


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "FIRST_BYTES", 512 * KIB)
    monkeypatch.setattr(reads, "BULK_BYTES", 1024 * KIB)


class Node:
    """A node that the others can read from."""

    def __init__(self, number: int) -> None:
        self.transport: Transport = transport_factory("tcp", None)(f"node-{number}", "127.0.0.1")
        self.memory = ProbeMemory(1024 * KIB, number, torch.device("cpu"))
        self.probe = ReadProbe(self.transport, self.memory)
        self.described = NodeMemory(number, self.transport.describe())


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    made = [Node(0), Node(1)]
    yield made
    for node in made:
        node.transport.close()


LINKS = [Link(0, 1), Link(1, 0)]


def measure(probes: list[ReadProbe | None], memories: list[NodeMemory]) -> list[list[Link]]:
    """The results of every node; each in a thread of its own."""
    store = HashStore()
    found: dict[int, list[Link]] = {}

    def body(own: int) -> None:
        found[own] = measure_all(probes[own], memories, LINKS, StoreExchange(store, own, 2))

    threads = [threading.Thread(target=body, args=(own,)) for own in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[0], found[1]]


def test_every_node_reads_from_every_other_and_all_know_the_results(nodes: list[Node]) -> None:
    first, second = measure([n.probe for n in nodes], [n.described for n in nodes])
    assert first == second
    assert [(link.reader, link.source, link.error) for link in first] == [(0, 1, None), (1, 0, None)]
    assert all(link.latency and link.speed for link in first)


def test_a_node_that_is_not_ready_fails_its_links_alone(nodes: list[Node]) -> None:
    first, second = measure([nodes[0].probe, None], [nodes[0].described, NodeMemory(1, error="no UCX")])
    assert first == second
    assert [link.failed for link in first] == [Step.START, Step.START]


def test_wrong_bytes_are_an_error(nodes: list[Node]) -> None:
    of_another_node = ProbeMemory(1024 * KIB, 7, torch.device("cpu"))
    nodes[1].memory.words.copy_(of_another_node.words)
    first, _ = measure([n.probe for n in nodes], [n.described for n in nodes])
    assert "other bytes" in (first[0].error or "")
    assert first[0].failed is Step.READ
    assert first[1].error is None


def test_a_reader_that_falls_silent_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "TURN_SECONDS", 0.01)
    links = [Link(1, 0), Link(1, 2)]
    found = measure_all(None, [NodeMemory(n) for n in range(3)], links, StoreExchange(HashStore(), 0, 3))
    assert [link.failed for link in found] == [Step.READER, Step.READER]


def test_links_whose_turn_comes_too_late_are_left_out(nodes: list[Node], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reads, "ALL_SECONDS", -1.0)
    first, second = measure([n.probe for n in nodes], [n.described for n in nodes])
    assert first == second
    assert [link.failed for link in first] == [Step.TIME, Step.TIME]

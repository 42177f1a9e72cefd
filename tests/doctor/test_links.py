"""What is said of nodes and of links that are broken."""

from __future__ import annotations

import msgspec

from tandem.doctor.links import Link, NodeInfo, Step, clock_skew, key_difference, link_advice, shared_machines

NODES = [NodeInfo(0, "10.0.0.1", "eth0", "m0", "k"), NodeInfo(1, "10.0.0.2", "eth0", "m1", "k")]


def advice(failed: Step, connector: str = "nixl", **source: str) -> str:
    nodes = [NODES[0], msgspec.structs.replace(NODES[1], **source)]
    return link_advice(Link(0, 1).failure(failed, "x"), nodes, connector)


def test_a_link_that_works_needs_no_words() -> None:
    assert link_advice(Link(0, 1), NODES, "nixl") == ""


def test_what_to_do_follows_from_the_step_that_failed() -> None:
    assert "firewall" in advice(Step.CONNECTION)
    assert "--host" in advice(Step.CONNECTION, host="127.0.0.1")
    assert "different cluster keys" in advice(Step.CONNECTION, key="l")
    assert "see what is said" in advice(Step.CONNECTION, error="cannot listen")
    assert "UCX_NET_DEVICES=eth0 " in advice(Step.READ)
    assert "MTU" in advice(Step.READ, "tcp")
    assert "node 0" in advice(Step.READER)
    assert "fewer nodes" in advice(Step.TIME)


def test_clocks_that_are_apart_are_remarked_on() -> None:
    assert "60 s ahead" in (clock_skew(NODES, [100.0, 160.0]) or "")
    assert clock_skew(NODES, [100.0, 100.5]) is None
    assert clock_skew(NODES, []) is None


def test_nodes_on_one_machine_are_remarked_on() -> None:
    assert shared_machines(NODES) is None
    assert "one machine" in (shared_machines([NODES[0], msgspec.structs.replace(NODES[1], machine="m0")]) or "")


def test_keys_that_differ_are_named_with_their_nodes() -> None:
    assert key_difference(NODES) is None
    found = key_difference([NODES[0], msgspec.structs.replace(NODES[1], key=None)])
    assert found == "node 0 (10.0.0.1) has key k, node 1 (10.0.0.2) has none"

"""Pings between nodes of one process."""

from __future__ import annotations

import pytest

from tandem.doctor import ping
from tandem.doctor.links import NodeInfo, Step, link_advice
from tandem.doctor.ping import PingServer, ping_all
from tandem.wire.keys import ClusterKey, new_key


def info(number: int, server: PingServer | None, key: str | None = None) -> NodeInfo:
    return NodeInfo(number, "127.0.0.1", "lo", "m", key, server.port if server else None)


def test_a_ping_server_answers_those_who_hold_its_key_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ping, "PING_SECONDS", 0.7)
    keys: list[ClusterKey] = [new_key(), new_key()]
    servers = [PingServer("127.0.0.1", keys[0]), PingServer("127.0.0.1", keys[0]), PingServer("127.0.0.1", keys[1])]
    nodes = [info(number, server, "ab"[number == 2]) for number, server in enumerate(servers)]
    nodes.append(info(3, None))
    found = {link.source: link for link in ping_all(servers[0], nodes[0], nodes)}
    for server in servers:
        server.close()
    assert found[1].error is None
    assert found[1].ping
    assert "no answer" in (found[2].error or "")
    assert "different cluster keys" in link_advice(found[2], nodes, "nixl")
    assert "does not listen" in (found[3].error or "")


def test_a_node_that_cannot_listen_pings_nobody() -> None:
    nodes = [info(0, None), info(1, None)]
    [link] = ping_all(None, nodes[0], nodes)
    assert (link.reader, link.source, link.failed) == (0, 1, Step.START)
    assert "node 0 (127.0.0.1) does not listen" in (link.error or "")

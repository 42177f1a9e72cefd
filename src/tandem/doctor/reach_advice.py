"""Why one node does not reach another, and what to do, in words."""

from __future__ import annotations

from tandem.doctor.cluster_messages import NodeDoor, Reach
from tandem.wire.addresses import is_loopback

SKEW_SECONDS = 5.0


def advice(result: Reach, nodes: list[NodeDoor], connector: str) -> str | None:
    """None where nothing went wrong."""
    if result.error is None:
        return None
    reader, source = nodes[result.reader], nodes[result.source]
    match result.step:
        case "start":
            return "see what is said of that node below"
        case "reader":
            return f"look at what {reader} printed: it ended or hangs"
        case "time":
            return "check fewer nodes at once"
        case "connection":
            return _connection(reader, source)
        case _:
            return _ucx(reader, source) if connector == "nixl" else _tcp(reader, source)


def _connection(reader: NodeDoor, source: NodeDoor) -> str:
    if source.error is not None:
        return "see what is said of that node below"
    if reader.key != source.key:
        return "they hold different cluster keys: copy one file to every node"
    if is_loopback(source.host):
        return f"{source.host} is loopback: start node {source.node} with --host set to its address in the cluster"
    return (
        f"a firewall, or no route, between {reader.host} and {source.host}: engines listen on any free port, so open"
        f" all of them from {reader.host} to {source.host}, or set --host to an address that the others reach"
    )


def _ucx(reader: NodeDoor, source: NodeDoor) -> str:
    interfaces = sorted({node.interface for node in (reader, source) if node.interface})
    names = " or ".join(interfaces) if interfaces else "the interface between the nodes"
    return (
        f"the encrypted sockets work, UCX does not: it may have chosen an interface that the other node does not reach;"
        f" set UCX_NET_DEVICES={names} (for RDMA the device, such as mlx5_0:1) and unset UCX_TLS on every node; open"
        f" all ports between {reader.host} and {source.host}; or use --connector tcp"
    )


def _tcp(reader: NodeDoor, source: NodeDoor) -> str:
    return (
        f"the connection from {reader.host} to {source.host} does not carry large messages: compare the MTU of both"
        " interfaces and of what is between them, and look for a firewall that cuts connections"
    )


def clock_skew(nodes: list[NodeDoor], clocks: list[float]) -> str | None:
    """A remark where wall clocks are so far apart that log lines of the nodes cannot be compared."""
    if not clocks:
        return None
    ahead = max(clocks) - min(clocks)
    if ahead < SKEW_SECONDS:
        return None
    last, first = nodes[clocks.index(max(clocks))], nodes[clocks.index(min(clocks))]
    return (
        f"the clock of {last} is {ahead:.0f} s ahead of that of {first}: nothing in Tandem depends on it, but log lines"
        " cannot be compared; start a time service"
    )


def shared_machines(nodes: list[NodeDoor]) -> str | None:
    """A remark where several nodes are one machine, so that the numbers say nothing about the network."""
    machines: dict[str, list[str]] = {}
    for node in nodes:
        machines.setdefault(node.machine, []).append(str(node))
    shared = [" and ".join(names) for names in machines.values() if len(names) > 1]
    if not shared:
        return None
    return f"{'; '.join(shared)} are one machine: UCX may move bytes between them through memory, not the network"

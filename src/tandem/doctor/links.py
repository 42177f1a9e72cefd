"""Nodes of a cluster and the links between them: the records that nodes exchange, and advice about broken links."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import msgspec

from tandem.transfer.transports.base import RankEndpoint
from tandem.wire.addresses import is_loopback

SKEW_SECONDS = 5.0


class NodeInfo(msgspec.Struct, frozen=True):
    """A node as the others see it.

    Attributes:
        host: its address towards the others; `interface` has it, None if that cannot be told.
        machine: names the machine as long as it is up; namespaces and containers of one machine share it.
        key: digest of the cluster key; None without one.
        port: of its ping server; None if it could not listen, for `error`.
    """

    number: int
    host: str
    interface: str | None
    machine: str
    key: str | None
    port: int | None = None
    error: str | None = None

    def __str__(self) -> str:
        return f"node {self.number} ({self.host})"


class NodeMemory(msgspec.Struct, frozen=True):
    """The probe memory of a node, or why others cannot read it."""

    node: int
    endpoint: RankEndpoint | None = None
    error: str | None = None


class Step(enum.Enum):
    """The step of a link's check at which it failed.

    START: a node takes no part. CONNECTION: no answer to pings. READER: the reader fell silent. TIME: none was left.
    READ: by the transport.
    """

    START = "start"
    CONNECTION = "connection"
    READER = "reader"
    TIME = "time"
    READ = "read"


class Link(msgspec.Struct, frozen=True):
    """The way from node `reader` to node `source`.

    Attributes:
        ping: seconds for a round trip over the encrypted sockets that engines talk through.
        latency: seconds for a read of a few KiB; the median.
        speed: bytes per second of a large read.
        error: what went wrong, in the transport's words; what was measured before is there.
        failed: the step at which it went wrong.
    """

    reader: int
    source: int
    ping: float | None = None
    latency: float | None = None
    speed: float | None = None
    error: str | None = None
    failed: Step | None = None

    def failure(self, failed: Step, error: str) -> Link:
        """Return this link as one that is broken."""
        return msgspec.structs.replace(self, failed=failed, error=error)


def link_advice(link: Link, nodes: Sequence[NodeInfo], connector: str) -> str:
    """Return what to do about a link; empty where nothing went wrong."""
    reader, source = nodes[link.reader], nodes[link.source]
    match link.failed:
        case None:
            return ""
        case Step.START:
            return "see what is said of that node below"
        case Step.READER:
            return f"look at what {reader} printed: it ended or hangs"
        case Step.TIME:
            return "check fewer nodes at once"
        case Step.CONNECTION:
            return _connection_advice(reader, source)
        case Step.READ if connector == "nixl":
            names = " or ".join(sorted({node.interface for node in (reader, source) if node.interface}))
            return (
                "the encrypted sockets work, UCX does not: it may have chosen an interface that the other node does not"
                f" reach; set UCX_NET_DEVICES={names or 'the interface between the nodes'} (for RDMA the device, such"
                " as mlx5_0:1) and unset UCX_TLS on every node; open all ports between"
                f" {reader.host} and {source.host}; or use --connector tcp"
            )
        case Step.READ:
            return (
                f"the connection from {reader.host} to {source.host} does not carry large messages: compare the MTU of"
                " both interfaces and of what is between them, and look for a firewall that cuts connections"
            )


def _connection_advice(reader: NodeInfo, source: NodeInfo) -> str:
    if source.error is not None:
        return "see what is said of that node below"
    if reader.key != source.key:
        return "they hold different cluster keys: copy one file to every node"
    if is_loopback(source.host):
        return f"{source.host} is loopback: start node {source.number} with --host set to its address in the cluster"
    return (
        f"a firewall, or no route, between {reader.host} and {source.host}: engines listen on any free port, so open"
        f" all of them from {reader.host} to {source.host}, or set --host to an address that the others reach"
    )


def key_difference(nodes: Sequence[NodeInfo]) -> str | None:
    """Return which nodes have which cluster key, where not all have the same."""
    if len({node.key for node in nodes}) == 1:
        return None
    return ", ".join(f"{node} has {f'key {node.key}' if node.key else 'none'}" for node in nodes)


def clock_skew(nodes: Sequence[NodeInfo], clocks: Sequence[float]) -> str | None:
    """Return a remark where wall clocks (seconds) are so far apart that log lines of the nodes cannot be compared."""
    ahead = max(clocks, default=0.0) - min(clocks, default=0.0)
    if ahead < SKEW_SECONDS:
        return None
    last, first = nodes[clocks.index(max(clocks))], nodes[clocks.index(min(clocks))]
    return (
        f"the clock of {last} is {ahead:.0f} s ahead of that of {first}: nothing in Tandem depends on it, but log lines"
        " cannot be compared; start a time service"
    )


def shared_machines(nodes: Sequence[NodeInfo]) -> str | None:
    """Return a remark where several nodes are one machine: the numbers then say nothing about the network."""
    machines: dict[str, list[str]] = {}
    for node in nodes:
        machines.setdefault(node.machine, []).append(str(node))
    shared = [" and ".join(names) for names in machines.values() if len(names) > 1]
    if not shared:
        return None
    return f"{'; '.join(shared)} are one machine: UCX may move bytes between them through memory, not the network"

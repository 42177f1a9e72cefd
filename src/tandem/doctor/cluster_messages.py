"""What the nodes of a cluster check tell each other."""

from __future__ import annotations

import msgspec

from tandem.transfer.transports.base import RankEndpoint


class NodeDoor(msgspec.Struct, frozen=True):
    """Where the others may knock at a node.

    Attributes:
        host: its address towards the others; `interface` has it, None if that cannot be told.
        machine: names the machine as long as it is up; namespaces and containers of one machine share it.
        key: digest of the cluster key; None without one.
        port: of its encrypted socket, which answers pings; None if it could not listen, for `error`.
    """

    node: int
    host: str
    interface: str | None
    machine: str
    key: str | None
    port: int | None = None
    error: str | None = None

    def __str__(self) -> str:
        return f"node {self.node} ({self.host})"


class NodeMemory(msgspec.Struct, frozen=True):
    """What the others can read of a node, or why they cannot."""

    node: int
    endpoint: RankEndpoint | None = None
    error: str | None = None


class Reach(msgspec.Struct, frozen=True):
    """How one node reaches another.

    Attributes:
        ping: seconds for a round trip over the encrypted sockets that engines talk through.
        latency: seconds for a read of a few KiB; the median.
        speed: bytes per second of a large read.
        error: what went wrong, in the transport's words; what was measured before it is there.
        step: at which of "start", "connection", "reader", "time", "read" it went wrong.
    """

    reader: int
    source: int
    ping: float | None = None
    latency: float | None = None
    speed: float | None = None
    error: str | None = None
    step: str | None = None


class Pinged(msgspec.Struct, frozen=True):
    """All that one node found by knocking."""

    reach: list[Reach]

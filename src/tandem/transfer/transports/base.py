"""The interface between KV transfer and the ways in which bytes travel.

A `Transport` belongs to one worker and is used by that worker's transfer thread alone. It knows addresses and
bytes, nothing of requests, blocks or layouts. To add one, write a class like `tcp.client.TcpTransport` and name it in
`registry.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from tandem.kv.layout import MOST_BYTES
from tandem.kv.runs import Runs

MAX_METADATA = 1 << 20
"""Bytes; NIXL's are some hundred for each network device of a node."""


class Region(msgspec.Struct, frozen=True, array_like=True):
    """A range of this process's memory, in bytes; `device` is -1 for host memory, else a CUDA index."""

    address: Annotated[int, Meta(ge=0, lt=2**62)]
    length: Annotated[int, Meta(ge=0, le=MOST_BYTES)]
    device: Annotated[int, Meta(ge=-1, lt=1024)] = -1


class RankEndpoint(msgspec.Struct, frozen=True, array_like=True):
    """The way to another rank's memory: returned by `describe`, taken by `connect`.

    Attributes:
        agent: unique name of the rank in this incarnation of its engine.
        metadata: opaque to all but the transport that made it.
        region: the KV memory; reads must stay inside.
    """

    agent: Annotated[str, Meta(min_length=1, max_length=1024)]
    metadata: Annotated[bytes, Meta(max_length=MAX_METADATA)]
    region: Region


class ReadState(enum.Enum):
    """The state of a read: IN_PROGRESS, then DONE, FAILED, or FAILING and some time later FAILED.

    FAILING: it will not be done, and yet bytes of it may still arrive, as where a transport gives up a connection with
    its first error while other parts of the read are under way. After DONE and FAILED no byte of it arrives.
    """

    IN_PROGRESS = "in_progress"
    DONE = "done"
    FAILING = "failing"
    FAILED = "failed"


class Read(Protocol):
    """A read that was posted. It cannot be called back: until it is DONE or FAILED its bytes may still arrive."""

    @property
    def state(self) -> ReadState: ...

    @property
    def error(self) -> str | None: ...


class Transport(Protocol):
    """Register memory, describe it, connect to a peer, post reads, poll, close.

    All methods are called by one thread and none may block for long: `connect` may take as long as opening a
    connection does; the others return at once.
    """

    def register(self, region: Region) -> None:
        """Make the memory readable by peers and writable by our reads. Once, before anything else."""

    def describe(self) -> RankEndpoint:
        """Return what peers need to read the registered memory."""

    def connect(self, peer: RankEndpoint) -> None:
        """Prepare to read from the peer. Raises TransferError."""

    def disconnect(self, agent: str) -> None:
        """Forget a peer: nothing more is posted to it.

        Its reads become FAILED, at once or as soon as the transport knows that no byte of them can arrive.
        """

    def post(self, agent: str, runs: Runs) -> Read:
        """Start reading runs from the peer's region (their source) into our own (their destination).

        Raises TransferError for runs outside of either region or a peer that is not connected, PeerLost for one that
        is lost.
        """

    def poll(self) -> None:
        """Make progress with our reads and, where we serve bytes ourselves, with those of peers."""

    def wait_on(self) -> Sequence[Any]:
        """Return sockets or file descriptors which, when readable, make `poll` worth while (for zmq.Poller).

        May change with every call of another method; empty means: poll on a timer while reads are in progress.
        """

    def close(self) -> None:
        """Disconnect from all peers and release the memory, within about two seconds. Idempotent."""


TransportFactory = Callable[[str, str], Transport]
"""Makes a transport from this rank's agent name and the host name or address under which peers reach this node."""

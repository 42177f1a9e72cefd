"""The seam between moving KV and how bytes travel.

A `Transport` belongs to one worker and is used by that worker's transfer thread alone. It knows addresses and
bytes, nothing of requests, blocks or layouts. To add one, write a file with a class like `tcp.client.TcpTransport` and
name it in `registry.py`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray


class Region(msgspec.Struct, frozen=True, array_like=True):
    """A range of this process's memory, in bytes; `device` is -1 for host memory, else a CUDA index."""

    address: int
    length: int
    device: int = -1


class RankEndpoint(msgspec.Struct, frozen=True, array_like=True):
    """How another rank reaches this rank's memory: what `describe` returns and `connect` takes.

    Attributes:
        agent: unique name of this rank in this life of its engine.
        metadata: the transport's own words.
        region: the KV memory; reads must stay inside.
    """

    agent: str
    metadata: bytes
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

    All methods are called from one thread and none may block for long: `connect` may take as long as opening a
    connection does; the others return at once.
    """

    def register(self, region: Region) -> None:
        """Make the memory readable by peers and writable by our reads. Once, before anything else."""

    def describe(self) -> RankEndpoint:
        """What peers need to read the registered memory."""

    def connect(self, peer: RankEndpoint) -> None:
        """Get ready to read from the peer. Raises TransferError."""

    def disconnect(self, agent: str) -> None:
        """Forget a peer: nothing more is posted to it.

        Its reads become FAILED, at once or as soon as the transport knows that no byte of them can arrive.
        """

    def post(
        self, agent: str, source: NDArray[np.int64], destination: NDArray[np.int64], length: NDArray[np.int64]
    ) -> Read:
        """Start reading runs: `length[i]` bytes from `source[i]` into `destination[i]`.

        Offsets are in bytes from the start of the peer's and of our own region. Raises TransferError for runs
        outside of either region, or a peer that is not connected or is lost.
        """

    def poll(self) -> None:
        """Move everything forward that can move, our reads and, where we serve bytes ourselves, those of others."""

    def wait_on(self) -> Sequence[Any]:
        """Sockets or file descriptors which, when readable, make `poll` worth while (for zmq.Poller).

        May change with every call of another method; empty means: poll on a timer while reads are in progress.
        """

    def close(self) -> None:
        """End everything, within about two seconds. Idempotent."""


TransportFactory = Callable[[str, str], Transport]
"""Makes a transport from this rank's agent name and the host name or address under which peers reach this node."""

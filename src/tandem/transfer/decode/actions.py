"""Actions that the pure core of the decode side asks of its shell."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.transfer.decode.pull import Pull
from tandem.transfer.thread.thread_messages import ToTransferThread
from tandem.wire.messages import Address
from tandem.wire.peer_messages import ToPrefill


@dataclass(frozen=True, slots=True)
class Connect:
    """Open the connection of a session, and hand on what comes in by it."""

    session: int
    address: Address


@dataclass(frozen=True, slots=True)
class Disconnect:
    session: int


@dataclass(frozen=True, slots=True)
class Send:
    """Send to the prefill engine of a session, over its connection."""

    session: int
    message: ToPrefill


@dataclass(frozen=True, slots=True)
class Order:
    """Give an order to the transfer thread of this rank, or of all."""

    message: ToTransferThread
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class PullArrived:
    """All KV of a request is here, and no read is in progress. Nothing more is said of it."""

    pull: Pull


@dataclass(frozen=True, slots=True)
class PullFailed:
    """The KV of a request will not come. `PullQuiet` follows.

    `first_token`: of the request's output, where the prefill engine has told that it sends it to the client.
    """

    request_id: str
    reason: str
    first_token: int | None = None


@dataclass(frozen=True, slots=True)
class PullQuiet:
    """No byte can arrive any more in the blocks of a request that failed or was given up."""

    request_id: str


Action = Connect | Disconnect | Send | Order | PullArrived | PullFailed | PullQuiet

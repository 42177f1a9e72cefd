"""What the leader's event loop tells its step loop."""

from __future__ import annotations

from dataclasses import dataclass

from tandem.transfer.decode.pull import Pull
from tandem.wire.messages import Generate

STUCK_SECONDS = 5.0
"""A step loop ends within this time of hearing that a rank is lost, or it hangs in a collective with that rank."""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """A request came from frontend number `frontend`."""

    frontend: int
    generate: Generate


@dataclass(frozen=True, slots=True)
class AbortRequest:
    request_id: str


@dataclass(frozen=True, slots=True)
class KvArrived:
    pull: Pull


@dataclass(frozen=True, slots=True)
class KvFailed:
    """The KV of a request will not come; reads may still be in progress until `ReadsEnded`."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReadsEnded:
    request_id: str


@dataclass(frozen=True, slots=True)
class LeasesEnded:
    """No reader holds the blocks of these requests any more."""

    request_ids: list[str]


@dataclass(frozen=True, slots=True)
class Shutdown:
    """`failed`: not because somebody asked for it."""

    reason: str
    failed: bool = False


Command = StartRequest | AbortRequest | KvArrived | KvFailed | ReadsEnded | LeasesEnded | Shutdown

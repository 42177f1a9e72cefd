"""Messages between an engine's leader and the transfer thread of each of its ranks."""

from __future__ import annotations

import msgspec

from tandem.transfer.handshake import RankDescriptor
from tandem.wire.messages import Count, Name, Seconds, Text

# --- what a transfer thread receives ---------------------------------------------------------------------------


class OpenPeer(msgspec.Struct, frozen=True, tag="open_peer"):
    """Connect to these ranks of a peer engine: just those that this rank reads from."""

    peer: Name
    sources: list[RankDescriptor]


class ClosePeer(msgspec.Struct, frozen=True, tag="close_peer"):
    """Forget a peer; its reads in progress end."""

    peer: Name


class ReadOrder(msgspec.Struct, frozen=True, tag="read"):
    """Read the KV of tokens [start, stop) of a request.

    Attributes:
        source_blocks, destination_blocks: both block tables from the request's first token on.
        last: no later read touches the last block.
    """

    job: Count
    peer: Name
    request_id: Name
    source_blocks: list[Count]
    destination_blocks: list[Count]
    start: Count
    stop: Count
    last: bool


class StopThread(msgspec.Struct, frozen=True, tag="stop"):
    """The engine ends."""


ToTransferThread = OpenPeer | ClosePeer | ReadOrder | StopThread


# --- what the leader receives ----------------------------------------------------------------------------------


class ThreadAlive(msgspec.Struct, frozen=True, tag="mover_ready"):
    """First message of a transfer thread, and its heartbeat."""

    rank: Count


class PeerOpened(msgspec.Struct, frozen=True, tag="peer_opened"):
    rank: Count
    peer: Name
    error: Text | None = None


class PeerClosed(msgspec.Struct, frozen=True, tag="peer_closed"):
    rank: Count
    peer: Name


class ReadEnded(msgspec.Struct, frozen=True, tag="read_ended"):
    """A read has ended on one rank: no byte of it arrives after this.

    Attributes:
        error: why its bytes are no good.
        peer_lost: the connection to the peer's rank is broken, so that no other read over it can succeed either.
    """

    rank: Count
    job: Count
    bytes: Count
    descriptors: Count
    seconds: Seconds
    error: Text | None = None
    peer_lost: bool = False


FromTransferThread = ThreadAlive | PeerOpened | PeerClosed | ReadEnded

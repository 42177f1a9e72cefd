"""Messages between an engine's leader and the transfer thread of each of its ranks."""

from __future__ import annotations

import msgspec

from tandem.transfer.handshake import RankDescriptor
from tandem.wire.fields import Count, Name, Seconds, Text

# --- what a transfer thread receives ---------------------------------------------------------------------------


class OpenPeer(msgspec.Struct, frozen=True, tag="open_peer"):
    """Connect to these ranks of the peer engine of a session: just those that this rank reads from."""

    session: Count
    sources: list[RankDescriptor]


class ClosePeer(msgspec.Struct, frozen=True, tag="close_peer"):
    """Disconnect from the peer of a session; its reads in progress fail."""

    session: Count


class ReadOrder(msgspec.Struct, frozen=True, tag="read"):
    """Read the KV of tokens [start, stop) of a request.

    Attributes:
        source_blocks, destination_blocks: both block tables from the request's first token on.
        last: no later read touches the last block.
    """

    job: Count
    session: Count
    request_id: Name
    source_blocks: list[Count]
    destination_blocks: list[Count]
    start: Count
    stop: Count
    last: bool


class StopThread(msgspec.Struct, frozen=True, tag="stop"):
    """The engine ends. `failed`: why, if nobody asked for it: this rank cannot go on, whatever its step loop does."""

    failed: Text | None = None


class LeaderAlive(msgspec.Struct, frozen=True, tag="leader_alive"):
    """The heartbeat of the leader."""


ToTransferThread = LeaderAlive | OpenPeer | ClosePeer | ReadOrder | StopThread


# --- what the leader receives ----------------------------------------------------------------------------------


class ThreadAlive(msgspec.Struct, frozen=True, tag="thread_alive"):
    """First message of a transfer thread, and its heartbeat."""

    rank: Count


class PeerOpened(msgspec.Struct, frozen=True, tag="peer_opened"):
    """This rank is connected to the ranks it reads from; or it is not, and why."""

    rank: Count
    session: Count
    error: Text | None = None


class ReadEnded(msgspec.Struct, frozen=True, tag="read_ended"):
    """A read has ended on one rank.

    Attributes:
        error: why its bytes are no good.
        peer_lost: the connection to the peer's rank is broken, so that no other read over it can succeed either.
        corrupt: its bytes came, and do not fit their checksums.
        may_still_write: it has failed, and yet bytes of it may arrive until `ReadQuiet`; else no byte arrives any more.
    """

    rank: Count
    job: Count
    bytes: Count
    descriptors: Count
    seconds: Seconds
    error: Text | None = None
    peer_lost: bool = False
    may_still_write: bool = False
    corrupt: bool = False


class ReadQuiet(msgspec.Struct, frozen=True, tag="read_quiet"):
    """No byte of a read that ended with `may_still_write` arrives any more on this rank."""

    rank: Count
    job: Count


FromTransferThread = ThreadAlive | PeerOpened | ReadEnded | ReadQuiet

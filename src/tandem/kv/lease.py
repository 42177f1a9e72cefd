"""Leases on KV blocks: a reader knows by them that the bytes it read were still the bytes it wanted.

After Gray and Cheriton, "Leases: an efficient fault-tolerant mechanism for distributed file cache consistency"
(SOSP 1989). The *holder* (a prefill engine) keeps blocks which a *reader* (a decode engine) reads one-sidedly, so
the holder does not see when. Their clocks are not synchronised; they only run at the same rate.

The argument: the reader notes its clock `s` when it sends a claim or a renewal. The holder receives it later, at some
moment `r >= s` of real time, and if it still has the blocks, keeps them until `ttl` after `r`. Once the reader hears
that this very message was received in time, it knows that the blocks stay at least until `r + ttl >= s + ttl`, and
`s + ttl` is a time on its own clock. However long messages travel, a read that completes before `s + ttl` read what it
should; one that completes later may have read anything and is thrown away. A lost or late answer only makes the reader
more careful, and a reader that is never heard of again costs the holder `ttl`.

Two things make it safe that are easy to miss: the time counts from *sending*, not from the answer; and a message
that is sent again must count from its *first* sending, since one answer does not tell which of the two it answers
(renewals are numbered and so do not have this problem).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MIN_TTL = 1.0
"""Seconds. A lease is renewed three times in its ttl over the network."""

MAX_TTL = 3600.0
"""Seconds. A peer that is gone is noticed after a ttl, and keeps blocks for as long."""


# --- the holder ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EndedLease:
    """Blocks that may go back to the pool.

    Attributes:
        expired: time ran out; else every reader released them.
        claimed: whether any reader ever claimed them.
    """

    request_id: str
    blocks: Sequence[int]
    expired: bool
    claimed: bool


@dataclass(slots=True)
class _Lease:
    blocks: Sequence[int] | None = None  # None: claimed, but not handed over yet
    until: float = 0.0  # kept until then for a reader that has yet to claim
    readers: dict[str, float] = field(default_factory=dict)  # reader -> until when
    claimed: bool = False

    def end(self) -> float:
        """Return when the blocks may go back to the pool."""
        return max(self.readers.values(), default=self.until)


class LeaseTable:
    """The holder's side: the blocks that it must keep, for each reader until a time on its own clock.

    A claim may come before the blocks do: they are not here while they are being computed, but a reader that was
    told of the first chunks may be reading them. Readers are named, since a request may move from one decode engine to
    another: the blocks stay until the last of those that claimed them is done.

    Args:
        ttl: seconds for which a claim or renewal is good from its receipt.
    """

    def __init__(self, ttl: float) -> None:
        self.ttl = ttl
        self._leases: dict[str, _Lease] = {}
        self._soonest = float("inf")  # nothing ends before this

    def claim(self, request_id: str, reader: str, now: float) -> None:
        """Note a claim received at `now`. Claims of unknown requests count: the request may come later.

        For a request that has ended the answer to a claim is that there is no KV; then do not call this.
        """
        lease = self._leases.setdefault(request_id, _Lease())
        lease.claimed = True
        self._extend(lease, reader, now)

    def renew(self, reader: str, request_ids: Iterable[str], now: float) -> list[str]:
        """Extend this reader's leases. Returns the ids on which it has none, or none any more."""
        gone: list[str] = []
        for request_id in request_ids:
            lease = self._leases.get(request_id)
            if lease is None or reader not in lease.readers:
                gone.append(request_id)
            else:
                self._extend(lease, reader, now)
        return gone

    def hold(self, request_id: str, blocks: Sequence[int], now: float, *, wait: float | None = None) -> None:
        """Take over a request's blocks.

        Args:
            wait: seconds to keep them even if nobody has claimed them yet; None for `ttl`. 0 for KV that nobody wants
                any more: the blocks stay only as long as readers that claimed them already may be reading.
        """
        lease = self._leases.setdefault(request_id, _Lease())
        if lease.blocks is not None:
            raise ValueError(f"blocks of request {request_id} are held already")
        lease.blocks = blocks
        abandoned = lease.claimed and not lease.readers  # every reader that claimed it has released it already
        lease.until = now if abandoned else now + (self.ttl if wait is None else wait)
        self._soonest = min(self._soonest, lease.end())

    def withdraw(self, request_id: str, now: float) -> None:
        """Let blocks that are held wait for no first claim: they stay only for readers that may be reading them."""
        lease = self._leases.get(request_id)
        if lease is not None and lease.blocks is not None:
            lease.until = now
            self._soonest = min(self._soonest, lease.end())

    def release(self, request_id: str, reader: str, now: float) -> EndedLease | None:
        """End this reader's part. Returns the lease if that was the last reader and the blocks are here."""
        lease = self._leases.get(request_id)
        if lease is None or lease.readers.pop(reader, None) is None or lease.readers:
            return None
        if lease.blocks is None:
            # Remember for a while that it was released, so that the blocks need not wait for a claim when they come.
            lease.until = now + self.ttl
            self._soonest = min(self._soonest, lease.until)
            return None
        del self._leases[request_id]
        return EndedLease(request_id, lease.blocks, expired=False, claimed=True)

    def end_unclaimed(self, request_id: str) -> EndedLease | None:
        """End a lease at once. Returns None, and changes nothing, if any reader ever claimed it or it has no blocks.

        The third way for blocks to go back, and a safe one: nobody was ever told that they would stay.
        """
        lease = self._leases.get(request_id)
        if lease is None or lease.blocks is None or lease.claimed:
            return None
        del self._leases[request_id]
        return EndedLease(request_id, lease.blocks, expired=True, claimed=False)

    def expire(self, now: float) -> list[EndedLease]:
        """End leases that have run out and return those with blocks to give back. Cheap when none has."""
        if now < self._soonest:
            return []
        over = [request_id for request_id, lease in self._leases.items() if lease.end() <= now]
        ended = [(request_id, self._leases.pop(request_id)) for request_id in over]
        self._soonest = min((lease.end() for lease in self._leases.values()), default=float("inf"))
        return [
            EndedLease(request_id, lease.blocks, expired=True, claimed=lease.claimed)
            for request_id, lease in ended
            if lease.blocks is not None
        ]

    def _extend(self, lease: _Lease, reader: str, now: float) -> None:
        # Never shortened: messages may overtake each other only where the clock that is read went backwards.
        lease.readers[reader] = max(now + self.ttl, lease.readers.get(reader, now))
        self._soonest = min(self._soonest, lease.end())


# --- the reader ----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _ReaderLease:
    claim_sent: float  # the first time
    valid_until: float | None = None  # bytes read before this are good; None until the claim is answered


@dataclass(frozen=True, slots=True)
class Renewal:
    """A renewal that is sent at `sent_at`, on the reader's clock."""

    seq: int
    request_ids: list[str]
    sent_at: float


class ReaderLeases:
    """The reader's side: all its leases with one incarnation of one holder, renewed together.

    All times are on the reader's clock. A request id is claimed from one incarnation once; after `drop` it is not
    claimed again, as the answer to the old claim could be taken for the answer to the new one.

    Args:
        ttl: the holder's, from its handshake.
        interval: seconds between renewals; a third of the ttl survives the loss of one in two.
    """

    def __init__(self, ttl: float, interval: float | None = None) -> None:
        self.ttl = ttl
        self.interval = ttl / 3 if interval is None else interval
        self._leases: dict[str, _ReaderLease] = {}
        self._sent: dict[int, Renewal] = {}  # in order of seq and so of time
        self._next_seq = 0
        self._next_due: float | None = None

    def claim(self, request_id: str, now: float) -> None:
        """Note that the claim is sent now. If it was sent before, the first time counts."""
        self._leases.setdefault(request_id, _ReaderLease(claim_sent=now))
        if self._next_due is None:
            self._next_due = now + self.interval

    def claimed(self, request_id: str) -> None:
        """Note that the claim was answered."""
        lease = self._leases.get(request_id)
        if lease is not None and lease.valid_until is None:
            lease.valid_until = lease.claim_sent + self.ttl

    def due(self, now: float) -> Renewal | None:
        """Return the renewal that is to be sent now, if it is time. It counts as sent at `now`, so send it at once."""
        if self._next_due is None or now < self._next_due:
            return None
        # The answers to older ones would extend nothing any more.
        self._sent = {seq: renewal for seq, renewal in self._sent.items() if now < renewal.sent_at + self.ttl}
        # What is not answered yet is claimed, not renewed: the holder may not know it.
        request_ids = [request_id for request_id, lease in self._leases.items() if lease.valid_until is not None]
        self._next_due = now + self.interval if self._leases else None
        if not request_ids:
            return None
        renewal = self._sent[self._next_seq] = Renewal(self._next_seq, request_ids, sent_at=now)
        self._next_seq += 1
        return renewal

    def next_due(self) -> float | None:
        """Return when `due` is worth calling."""
        return self._next_due

    def renewed(self, seq: int, gone: Iterable[str]) -> list[str]:
        """Note that renewal `seq` was answered. Returns which of our leases are gone; they are dropped.

        An unknown seq (answered already, or so old that it means nothing) changes nothing but what is gone.
        """
        lost = [request_id for request_id in gone if self._leases.pop(request_id, None) is not None]
        renewal = self._sent.pop(seq, None)
        if renewal is None:
            return lost
        for request_id in renewal.request_ids:
            lease = self._leases.get(request_id)
            if lease is not None and lease.valid_until is not None:
                lease.valid_until = max(lease.valid_until, renewal.sent_at + self.ttl)
        return lost

    def good(self, request_id: str, completed_at: float) -> bool:
        """Tell whether bytes of a read for this request that completed then may be used; False for unknown ids."""
        lease = self._leases.get(request_id)
        return lease is not None and lease.valid_until is not None and completed_at < lease.valid_until

    def run_out(self, now: float) -> list[str]:
        """Return leases that cannot be relied on any more: not renewed in time, or not answered for a ttl."""
        return [
            request_id
            for request_id, lease in self._leases.items()
            if now >= (lease.claim_sent + self.ttl if lease.valid_until is None else lease.valid_until)
        ]

    def drop(self, request_id: str) -> None:
        """Forget a lease that was released or given up. Unknown ids are fine."""
        self._leases.pop(request_id, None)

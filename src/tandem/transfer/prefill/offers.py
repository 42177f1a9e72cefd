"""The prefill side of all hand-offs of an engine: offers, claims, leases. Pure; time is passed in.

Events come in by methods, what is to be done about them is taken out with `drain`.

A request's blocks are offered by the scheduler chunk by chunk and claimed by a decode engine; either may come first.
Blocks go back when their readers release them or the lease ends: aborting a request only makes its readers let go of
it. KV that was published and that nobody has claimed yet has no reader, so it may give way to others.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.kv.lease import LeaseTable
from tandem.transfer.prefill.published import UnclaimedKv
from tandem.wire.peer_messages import Claim, Claimed, KvComputed, KvGone, Release, Renew, Renewed, ToDecode

Client = bytes
"""Routing id of a decode engine's connection."""

MAX_EARLY_CLAIMS = 65536

PUBLISHED_SECONDS = 60.0
"""KV that was published to a foreign proxy waits so long for its decode engine: a proxy asks one after the other."""

OTHER_PROMPT = "it is the KV of another prompt"


@dataclass(slots=True)
class _Offer:
    """One request's KV.

    Attributes:
        known_by: None once the request itself has arrived; for a claim that came first, until when it may still.
        published: a foreign proxy tells a decode engine where it is, some time later.
        prompt: digest of its tokens; what a claim says must be equal.
        withdrawn: nobody waits for the request any more, so its blocks wait for no first claim.
        aborted: why nothing more comes, though the prompt was not computed.
    """

    known_by: float | None
    published: bool = False
    claimed: bool = False
    prompt: str | None = None
    readers: dict[Client, str | None] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    final: bool = False
    first_token: int | None = None
    withdrawn: bool = False
    aborted: str | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Send to the decode engine of a connection."""

    client: Client
    message: ToDecode


@dataclass(frozen=True, slots=True)
class OfferEnded:
    """The blocks of a request may return to the pool.

    Attributes:
        expired: a reader had claimed them and fell silent.
        gave_way: they were published, nobody had claimed them, and others need the room.
    """

    request_id: str
    expired: bool = False
    gave_way: bool = False


@dataclass(frozen=True, slots=True)
class OfferCorrupt:
    """A reader got bytes of this KV that do not fit their checksums: nobody else should get them."""

    request_id: str


Action = Send | OfferEnded | OfferCorrupt


class Offers:
    """Offers, claims and leases of one prefill engine.

    Args:
        incarnation: of this engine; goes into every message.
        ttl: seconds a lease lasts from the receipt of a claim or renewal.
        max_published: blocks that published KV may hold until it is claimed. A prompt that needs more is not for us.

    Attributes:
        short_of_blocks: a request waits for room in the pool. Published KV that waits for a claim for a ttl, as long as
            any other KV does, gives way then.
    """

    def __init__(self, incarnation: str, ttl: float, max_published: int) -> None:
        self._source = incarnation
        self._ttl = ttl
        self._leases = LeaseTable(ttl)
        self._offers: dict[str, _Offer] = {}
        self._unclaimed = UnclaimedKv(max_published)
        self.short_of_blocks = False
        self._early = 0
        self._actions: list[Action] = []

    def __len__(self) -> int:
        return len(self._offers)

    def drain(self) -> list[Action]:
        """Return what is to be done since the last call, in order."""
        actions, self._actions = self._actions, []
        return actions

    def knows(self, request_id: str) -> bool:
        """Return whether the request has arrived and its blocks are not given back yet."""
        offer = self._offers.get(request_id)
        return offer is not None and offer.known_by is None

    # --- what the engine says ------------------------------------------------------------------------------------

    def begin(self, request_id: str, prompt: str | None = None, *, published: bool = False) -> None:
        """The request has arrived. Once computed, its blocks wait for a claim: a ttl, or longer if `published`."""
        offer = self._offers.setdefault(request_id, _Offer(None))
        if offer.known_by is not None:
            self._early -= 1
        offer.known_by, offer.published, offer.prompt = None, published, prompt
        for client in [client for client, wanted in offer.readers.items() if wanted != prompt]:
            del offer.readers[client]
            self._gone(client, request_id, OTHER_PROMPT)

    def chunk(
        self,
        request_id: str,
        first_block: int,
        blocks: list[int],
        num_tokens: int,
        final: bool,
        token: int | None,
        now: float,
    ) -> None:
        """A chunk of the prompt has been computed; `blocks` start at place `first_block` of the block table."""
        offer = self._offers[request_id]
        offer.blocks[first_block:] = blocks
        offer.num_tokens, offer.final, offer.first_token = num_tokens, final, token
        if final:
            self._hold(request_id, offer, now)
        computed = KvComputed(self._source, request_id, first_block, blocks, num_tokens, final, token)
        self._actions += [Send(client, computed) for client in offer.readers]

    def abort(self, request_id: str, reason: str, now: float) -> None:
        """The request ends here before its prompt was computed. Its readers are told; their leases still hold."""
        offer = self._offers.get(request_id)
        if offer is None or offer.final:
            return
        offer.final, offer.aborted = True, reason
        self._leases.hold(request_id, offer.blocks, now, wait=0.0)
        self._gone_for_all(request_id, reason)

    def withdraw(self, request_id: str, now: float) -> None:
        """Nobody waits for the request any more: its KV, also what is still to come, waits for no first claim."""
        offer = self._offers.get(request_id)
        if offer is not None and offer.known_by is None:
            offer.withdrawn = True
            self._leases.withdraw(request_id, now)

    # --- what decode engines say -----------------------------------------------------------------------------------

    def claim(self, client: Client, message: Claim, now: float) -> None:
        """A decode engine wants the request's KV, and is told of what is there already."""
        request_id = message.request_id
        offer = self._offers.get(request_id)
        if offer is None:
            if not message.early:
                self._gone(client, request_id, "there is no KV of it (any more)")
                return
            if self._early >= MAX_EARLY_CLAIMS:
                self._gone(client, request_id, "too many claims wait for their requests")
                return
            self._early += 1
            offer = self._offers[request_id] = _Offer(now + self._ttl)
        if offer.aborted is not None:
            self._gone(client, request_id, offer.aborted)
            return
        if offer.known_by is None and message.prompt != offer.prompt:
            self._gone(client, request_id, OTHER_PROMPT)
            return
        self._leases.claim(request_id, client.hex(), now)
        self._unclaimed.remove(request_id)
        offer.claimed = True
        offer.readers[client] = message.prompt
        self._send(client, Claimed(self._source, request_id, message.number))
        if offer.num_tokens:
            blocks = list(offer.blocks)
            computed = KvComputed(self._source, request_id, 0, blocks, offer.num_tokens, offer.final, offer.first_token)
            self._send(client, computed)

    def renew(self, client: Client, message: Renew, now: float) -> None:
        """Extend the leases that this client holds; the others are `gone`."""
        gone = self._leases.renew(client.hex(), message.request_ids, now)
        self._send(client, Renewed(self._source, message.seq, gone))

    def release(self, client: Client, message: Release, now: float) -> None:
        """The reader wants no more of these; ids it does not hold are ignored."""
        corrupt = set(message.corrupt)
        for request_id in message.request_ids:
            offer = self._offers.get(request_id)
            if offer is not None and client in offer.readers:
                del offer.readers[client]
                if request_id in corrupt:
                    self._actions.append(OfferCorrupt(request_id))
            if self._leases.release(request_id, client.hex(), now) is not None:
                self._end(request_id)

    # --- time ----------------------------------------------------------------------------------------------------

    def expire(self, now: float) -> None:
        """End what no reader has asked for in time. A prompt that is still being computed cannot expire."""
        for lease in self._leases.expire(now):
            request_id = lease.request_id
            expired = bool(lease.blocks and self._offers[request_id].readers)
            self._gone_for_all(request_id, "the lease ended")
            self._end(request_id, expired)
        if self.short_of_blocks:
            for request_id in self._unclaimed.older_than(self._ttl, now):
                self._give_way(request_id)
        if self._early:
            for request_id, offer in list(self._offers.items()):
                if offer.known_by is not None and offer.known_by <= now:
                    self._early -= 1
                    self._gone_for_all(request_id, "the request never came here")
                    del self._offers[request_id]

    # --- inside --------------------------------------------------------------------------------------------------

    def _send(self, client: Client, message: ToDecode) -> None:
        self._actions.append(Send(client, message))

    def _gone(self, client: Client, request_id: str, reason: str) -> None:
        self._send(client, KvGone(self._source, request_id, reason))

    def _gone_for_all(self, request_id: str, reason: str) -> None:
        for client in self._offers[request_id].readers:
            self._gone(client, request_id, reason)

    def _hold(self, request_id: str, offer: _Offer, now: float) -> None:
        """Keep the blocks of a whole prompt for its readers, those that are to come too."""
        wait = PUBLISHED_SECONDS if offer.published else None
        self._leases.hold(request_id, offer.blocks, now, wait=0.0 if offer.withdrawn else wait)
        if offer.published and not offer.claimed:
            self._unclaimed.add(request_id, offer.blocks, now)
            while (oldest := self._unclaimed.excess()) is not None:
                self._give_way(oldest)

    def _give_way(self, request_id: str) -> None:
        self._unclaimed.remove(request_id)
        if self._leases.end_unclaimed(request_id) is not None:
            self._end(request_id, gave_way=True)

    def _end(self, request_id: str, expired: bool = False, gave_way: bool = False) -> None:
        self._unclaimed.remove(request_id)
        del self._offers[request_id]
        self._actions.append(OfferEnded(request_id, expired, gave_way))

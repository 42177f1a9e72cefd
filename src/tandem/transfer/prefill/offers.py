"""The prefill side of a hand-off: what is announced to whom, and how long blocks are kept. Pure; time is passed in.

A request's blocks are offered by the scheduler chunk by chunk and claimed by a decode engine; either may come first.
Blocks go back when their readers release them or the lease ends, in no third way: aborting a request only makes its
readers let go of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.kv.lease import LeaseTable
from tandem.wire.peer_messages import Claim, Claimed, KvComputed, KvGone, Release, Renew, Renewed, ToDecode

Client = bytes
"""Routing id of a decode engine's connection."""

MAX_EARLY_CLAIMS = 65536
OTHER_PROMPT = "it is the KV of another prompt"


@dataclass(slots=True)
class _Offer:
    """One request's KV.

    Attributes:
        known_by: None once the request itself has arrived; for a claim that came first, until when it may still.
        wait: seconds for which its blocks are kept for a first claim.
        prompt: digest of its tokens; what a claim says must be equal.
        aborted: why nothing more comes, though the prompt was not computed.
    """

    known_by: float | None
    wait: float
    prompt: str | None = None
    readers: dict[Client, str | None] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    final: bool = False
    first_token: int | None = None
    aborted: str | None = None


@dataclass(slots=True)
class Outcome:
    """What to do after an event: messages to send, and requests whose blocks may return to the pool."""

    send: list[tuple[Client, ToDecode]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    expired: list[str] = field(default_factory=list)


class Producer:
    """Offers, claims and leases of one prefill engine.

    Args:
        incarnation: of this engine; goes into every message.
        ttl: seconds a lease lasts from the receipt of a claim or renewal.
    """

    def __init__(self, incarnation: str, ttl: float) -> None:
        self._source = incarnation
        self._ttl = ttl
        self._leases = LeaseTable(ttl)
        self._offers: dict[str, _Offer] = {}
        self._early = 0

    def __len__(self) -> int:
        return len(self._offers)

    def knows(self, request_id: str) -> bool:
        """Whether the request has arrived and its blocks are not given back yet."""
        offer = self._offers.get(request_id)
        return offer is not None and offer.known_by is None

    def begin(self, request_id: str, wait: float, prompt: str | None = None) -> Outcome:
        """The request has arrived. Once computed, its blocks wait so many seconds for a first claim."""
        offer = self._offers.setdefault(request_id, _Offer(None, wait))
        if offer.known_by is not None:
            self._early -= 1
        offer.known_by, offer.wait, offer.prompt = None, wait, prompt
        outcome = Outcome()
        for client in [client for client, wanted in offer.readers.items() if wanted != prompt]:
            del offer.readers[client]
            outcome.send.append((client, KvGone(self._source, request_id, OTHER_PROMPT)))
        return outcome

    def chunk(
        self,
        request_id: str,
        first_block: int,
        blocks: list[int],
        num_tokens: int,
        final: bool,
        token: int | None,
        now: float,
    ) -> Outcome:
        """A chunk of the prompt has been computed; `blocks` start at place `first_block` of the block table."""
        offer = self._offers[request_id]
        offer.blocks[first_block:] = blocks
        offer.num_tokens, offer.final, offer.first_token = num_tokens, final, token
        if final:
            self._leases.hold(request_id, offer.blocks, now, wait=offer.wait)
        ready = KvComputed(self._source, request_id, first_block, blocks, num_tokens, final, token)
        return Outcome(send=[(client, ready) for client in offer.readers])

    def claim(self, client: Client, message: Claim, now: float) -> Outcome:
        """A decode engine wants the request's KV, and is told of what is there already."""
        request_id = message.request_id
        offer = self._offers.get(request_id)
        if offer is None:
            if not message.early:
                return Outcome(send=[(client, KvGone(self._source, request_id, "there is no KV of it (any more)"))])
            if self._early >= MAX_EARLY_CLAIMS:
                gone = KvGone(self._source, request_id, "too many claims wait for their requests")
                return Outcome(send=[(client, gone)])
            self._early += 1
            offer = self._offers[request_id] = _Offer(now + self._ttl, self._ttl)
        if offer.aborted is not None:
            return Outcome(send=[(client, KvGone(self._source, request_id, offer.aborted))])
        if offer.known_by is None and message.prompt != offer.prompt:
            return Outcome(send=[(client, KvGone(self._source, request_id, OTHER_PROMPT))])
        self._leases.claim(request_id, client.hex(), now)
        offer.readers[client] = message.prompt
        outcome = Outcome(send=[(client, Claimed(self._source, request_id))])
        if offer.num_tokens:
            blocks = list(offer.blocks)
            ready = KvComputed(self._source, request_id, 0, blocks, offer.num_tokens, offer.final, offer.first_token)
            outcome.send.append((client, ready))
        return outcome

    def renew(self, client: Client, message: Renew, now: float) -> Outcome:
        """Extend the leases that this client holds; the others are `gone`."""
        gone = self._leases.renew(client.hex(), message.request_ids, now)
        return Outcome(send=[(client, Renewed(self._source, message.seq, gone))])

    def release(self, client: Client, message: Release, now: float) -> Outcome:
        """The reader wants no more of these; ids it does not hold are ignored."""
        outcome = Outcome()
        for request_id in message.request_ids:
            offer = self._offers.get(request_id)
            if offer is not None:
                offer.readers.pop(client, None)
            if self._leases.release(request_id, client.hex(), now) is not None:
                self._end(request_id, outcome)
        return outcome

    def abort(self, request_id: str, reason: str, now: float) -> Outcome:
        """The request ends here before its prompt was computed. Its readers are told; their leases still hold."""
        outcome = Outcome()
        offer = self._offers.get(request_id)
        if offer is None or offer.final:
            return outcome
        offer.final, offer.aborted = True, reason
        self._leases.hold(request_id, offer.blocks, now, wait=0.0)
        outcome.send = [(client, KvGone(self._source, request_id, reason)) for client in offer.readers]
        return outcome

    def expire(self, now: float) -> Outcome:
        """End what no reader has asked for in time. A prompt that is still being computed cannot expire."""
        outcome = Outcome()
        for lease in self._leases.expire(now):
            if lease.blocks and self._offers[lease.request_id].readers:
                outcome.expired.append(lease.request_id)
            self._gone(lease.request_id, "the lease ended", outcome)
            self._end(lease.request_id, outcome)
        if self._early:
            for request_id, offer in list(self._offers.items()):
                if offer.known_by is not None and offer.known_by <= now:
                    self._early -= 1
                    self._gone(request_id, "the request never came here", outcome)
                    del self._offers[request_id]
        return outcome

    def _gone(self, request_id: str, reason: str, outcome: Outcome) -> None:
        gone = KvGone(self._source, request_id, reason)
        outcome.send.extend((client, gone) for client in self._offers[request_id].readers)

    def _end(self, request_id: str, outcome: Outcome) -> None:
        del self._offers[request_id]
        outcome.ended.append(request_id)

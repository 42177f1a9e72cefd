"""Messages between the leaders of two engines: decode engines connect, prefill engines listen.

Every message after the handshake names the life (incarnation) of the prefill engine that it means, so that one
which restarted under the same address can tell that a message is not for it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tandem.ids import EngineIdentity
from tandem.wire.messages import Count, Name, Seconds, Text
from tandem.wire.sampling import TokenId

MAX_BATCH = 65536
MAX_BLOCKS = 4_194_304

RequestIds = Annotated[list[Name], Meta(max_length=MAX_BATCH)]
Blocks = Annotated[list[Count], Meta(max_length=MAX_BLOCKS)]


class Envelope(msgspec.Struct, frozen=True):
    """What is compared before anything else of a peer is looked at.

    Attributes:
        protocol: lowest and highest version spoken.
        fingerprint: decides whether KV bytes of one engine mean the same in the other.
        kv_dtype, connector: must be equal too; named apart for a clear refusal.
        software: for people; never compared.
    """

    protocol: tuple[Count, Count]
    fingerprint: Text
    kv_dtype: Name
    connector: Name
    software: Text


# --- what a prefill engine receives ----------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Opens a session. `expected`: the engine, and the life if known, that the sender means to reach."""

    envelope: Envelope
    identity: EngineIdentity
    expected_engine_id: Name
    expected_incarnation: Name | None = None


class Claim(msgspec.Struct, frozen=True, tag="claim"):
    """Announce this request's blocks to me, and keep them for a lease.

    Attributes:
        prompt: digest of the tokens whose KV is wanted; that of another prompt is not given out.
        early: the claim may come before the request itself (a router sends both at once).
        number: tells the sender's claims apart; comes back in `Claimed`.
    """

    to: Name
    request_id: Name
    prompt: Name | None = None
    early: bool = True
    number: Count = 0


class Renew(msgspec.Struct, frozen=True, tag="renew"):
    """Keep the blocks of these requests for another lease. `seq` comes back in `Renewed`."""

    to: Name
    seq: Count
    request_ids: RequestIds


class Release(msgspec.Struct, frozen=True, tag="release"):
    """All ranks have read what they need (or no longer want it): the blocks may go."""

    to: Name
    request_ids: RequestIds


ToPrefill = Hello | Claim | Renew | Release


# --- what a decode engine receives -----------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The session is open. `descriptor` is an `EngineDescriptor`, decoded only once the envelope fits."""

    envelope: Envelope
    identity: EngineIdentity
    lease_ttl: Seconds
    descriptor: msgspec.Raw


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """No session: `field` differs. `mine` is the value of the engine that refuses, `yours` that of the other."""

    identity: EngineIdentity
    field: Name
    mine: Text
    yours: Text


class Claimed(msgspec.Struct, frozen=True, tag="claimed"):
    """The claim was received; the lease runs from the moment the *claim was sent*, on the sender's clock."""

    source: Name
    request_id: Name
    number: Count = 0


class KvComputed(msgspec.Struct, frozen=True, tag="kv_arrived"):
    """A chunk of the prompt is computed on every rank.

    Attributes:
        first_block: place of the first of `block_ids` in the request's block table.
        block_ids: the blocks that this chunk finished or touched, in order.
        num_tokens: how many tokens of the request have their KV in place now, from its start.
        final: nothing more comes for this request.
        first_token: with `final`, the token that the prefill engine sampled.
    """

    source: Name
    request_id: Name
    first_block: Count
    block_ids: Blocks
    num_tokens: Count
    final: bool
    first_token: TokenId | None = None


class KvGone(msgspec.Struct, frozen=True, tag="kv_gone"):
    """There is no KV (any more) for this request: unknown, aborted, or its lease ended."""

    source: Name
    request_id: Name
    reason: Text


class Renewed(msgspec.Struct, frozen=True, tag="renewed"):
    """Answer to `Renew` number `seq`: all leases are extended but those in `gone`."""

    source: Name
    seq: Count
    gone: RequestIds


ToDecode = Welcome | Refused | Claimed | KvComputed | KvGone | Renewed

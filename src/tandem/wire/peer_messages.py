"""Messages between the leaders of two engines: decode engines connect, prefill engines listen.

Every message after the handshake names the incarnation of the prefill engine (`to`, `source`), so that an engine which
restarted at the same address can tell that a message is not for it.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tandem.ids import EngineIdentity
from tandem.wire.fields import Count, Name, Seconds, Text
from tandem.wire.sampling import TokenId

MAX_BATCH = 65536
MAX_BLOCKS = 4_194_304

RequestIds = Annotated[list[Name], Meta(max_length=MAX_BATCH)]
Blocks = Annotated[list[Count], Meta(max_length=MAX_BLOCKS)]


class Envelope(msgspec.Struct, frozen=True):
    """The part of a handshake that is compared before the rest is decoded.

    Attributes:
        protocol: lowest and highest version spoken.
        fingerprint: decides whether KV bytes of one engine mean the same in the other.
        kv_dtype, connector: must be equal too; separate fields for a clear refusal.
        software: for people; never compared.
    """

    protocol: tuple[Count, Count]
    fingerprint: Text
    kv_dtype: Name
    connector: Name
    software: Text


# --- received by a prefill engine ----------------------------------------------------------------------------


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """Open a session. `expected_...`: the engine, and the incarnation if known, that the sender means to reach."""

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
    """All ranks have read what they need (or no longer want it): the blocks may go.

    Attributes:
        corrupt: those of them whose bytes did not fit their checksums.
    """

    to: Name
    request_ids: RequestIds
    corrupt: RequestIds = []


ToPrefill = Hello | Claim | Renew | Release


# --- received by a decode engine -----------------------------------------------------------------------------


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """The session is open. `descriptor` is an `EngineDescriptor`, decoded only once the envelope is accepted."""

    envelope: Envelope
    identity: EngineIdentity
    lease_ttl: Seconds
    descriptor: msgspec.Raw


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """No session, because `field` differs. `mine` is the value of the engine that refuses, `yours` the other's."""

    identity: EngineIdentity
    field: Name
    mine: Text
    yours: Text


class Claimed(msgspec.Struct, frozen=True, tag="claimed"):
    """The claim was received; the lease runs from the moment at which the *claim was sent*, on the sender's clock."""

    source: Name
    request_id: Name
    number: Count = 0


class KvComputed(msgspec.Struct, frozen=True, tag="kv_computed"):
    """A chunk of the prompt is computed on every rank.

    Attributes:
        first_block: position of the first of `block_ids` in the request's block table.
        block_ids: the blocks that this chunk filled, in whole or in part, in order.
        num_tokens: number of tokens of the request whose KV is computed now, from its start.
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
    """There is no KV for this request, or none any more: unknown, aborted, or its lease ended."""

    source: Name
    request_id: Name
    reason: Text


class Renewed(msgspec.Struct, frozen=True, tag="renewed"):
    """The answer to `Renew` number `seq`: all leases are extended but those in `gone`."""

    source: Name
    seq: Count
    gone: RequestIds


ToDecode = Welcome | Refused | Claimed | KvComputed | KvGone | Renewed

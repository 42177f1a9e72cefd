"""What an engine tells of itself in its heartbeat, and in GET /tandem/engine."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from tandem.wire.fields import Count, Name, Seconds, Text

MAX_RANKS = 4096
MAX_PEERS = 4096


class RankInfo(msgspec.Struct, frozen=True):
    """A rank; `openmp` (a file name, or none) and `threads` are what it computes with on the CPU."""

    rank: Count
    tp_rank: Count
    pp_rank: Count
    node: Text
    pid: Count
    engine_id: Name
    incarnation: Name
    openmp: Name = "none"
    threads: Count = 1


class KvUsage(msgspec.Struct, frozen=True):
    """Blocks by state: `free + cached + leased + in_use == blocks`. Cached blocks are held by nobody and reusable."""

    block_size: Count
    blocks: Count
    free: Count
    cached: Count
    leased: Count
    in_use: Count


class RequestCounts(msgspec.Struct, frozen=True):
    waiting: Count = 0
    waiting_for_kv: Count = 0
    running: Count = 0


class Refusal(msgspec.Struct, frozen=True):
    """Two engines cannot share KV, because `field` differs. `ours` is the value of the engine that reports it."""

    field: Name
    ours: Text
    theirs: Text


class PeerInfo(msgspec.Struct, frozen=True):
    """A peer session. `state` is connecting, ready, refused or lost; `error` says why, `refusal` what differs.

    `handshake_time`: seconds until it was ready.
    """

    engine_id: Text
    incarnation: Text
    state: Text
    error: Text | None = None
    handshake_time: Seconds | None = None
    refusal: Refusal | None = None


class EngineCounters(msgspec.Struct, frozen=True):
    """Totals since the engine started, for /metrics."""

    requests: Count = 0
    requests_failed: Count = 0
    prompt_tokens: Count = 0
    output_tokens: Count = 0
    prefix_tokens: Count = 0
    preemptions: Count = 0
    kv_bytes: Count = 0
    kv_descriptors: Count = 0
    kv_failures: Count = 0
    kv_corrupt: Count = 0
    leases_expired: Count = 0
    published_dropped: Count = 0
    bad_messages: Count = 0
    steps: Count = 0


class EngineStatus(msgspec.Struct, frozen=True, tag="status"):
    """The heartbeat, and the content of GET /tandem/engine.

    Attributes:
        identity_time: seconds that the ranks took to agree on the engine's identity.
        draining: it takes no new requests, finishes those that it has, and ends.
        step_seconds: for which the step that runs now has run, on any rank; 0 without one.
    """

    engine_id: Name
    incarnation: Name
    role: Name
    model: Text
    fingerprint: Text
    tp: Count
    pp: Count
    nnodes: Count
    connector: Name
    ranks: Annotated[list[RankInfo], Meta(max_length=MAX_RANKS)]
    kv: KvUsage
    requests: RequestCounts
    peers: Annotated[list[PeerInfo], Meta(max_length=MAX_PEERS)]
    counters: EngineCounters = EngineCounters()
    identity_time: Seconds = 0.0
    draining: bool = False
    step_seconds: Seconds = 0.0

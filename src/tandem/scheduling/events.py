"""The scheduler's events for its caller. `Scheduler.drain()` returns them in the order in which they happened.

A request that was not aborted gets exactly one terminal event: `Finished` or `wire.messages.Failed`. Besides,
every Prefill request gets exactly one `PrefillEnded`, aborted or not, and every PullKv request either gets its KV
(`Scheduler.kv_arrived`), or the caller itself gives that up (`kv_failed`), or it gets one `PullEnded`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from tandem.wire.messages import Failed, RequestStats, TokenLogprobs

FinishReason = Literal["stop", "length"]


class TokenOut(msgspec.Struct, frozen=True):
    """A new output token.

    Attributes:
        index: its place in the request's output, counted from the client's prompt (0: first token).
        digest: of the output before it (`tandem.ids.output_digest`).
        finish_reason: set on the last token of the whole request; `Finished` follows at once.
    """

    request_id: str
    index: int
    token_id: int
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    digest: int = 0

    @property
    def stop_token_id(self) -> int | None:
        """The token that ended the request, if one did."""
        return self.token_id if self.finish_reason == "stop" else None


class PromptScored(msgspec.Struct, frozen=True):
    """Log-probabilities of the prompt's tokens from position `start` on; before the request's first TokenOut."""

    request_id: str
    start: int
    logprobs: list[TokenLogprobs]


class Finished(msgspec.Struct, frozen=True):
    """This engine's part of the request ended well.

    Attributes:
        finish_reason: None for a Prefill request whose output goes on at a decode engine.
        stats: times and counts that the scheduler knows; the caller adds what it moved (`msgspec.structs.replace`).
    """

    request_id: str
    finish_reason: FinishReason | None
    stats: RequestStats


class ChunkComputed(msgspec.Struct, frozen=True):
    """A chunk of a Prefill request is computed: its blocks may be read.

    Attributes:
        first_block: place of the first of `block_ids` in the request's block table.
        block_ids: the blocks that this chunk finished or touched, in order; in the first event of a request also
            those that the prefix cache had.
        num_tokens: number of tokens, from the start of the request, that have their KV in place.
        final: the last chunk.
        token: with `final`, the sampled token; None if it could not be sampled.
    """

    request_id: str
    first_block: int
    block_ids: list[int]
    num_tokens: int
    final: bool
    token: int | None = None


class PrefillEnded(msgspec.Struct, frozen=True):
    """A Prefill request left the scheduler for any reason; its blocks are the caller's now.

    The caller puts them into its lease table and gives them back with `BlockPool.unlease`. If not `ok`, nobody will
    get this KV any more, but whoever claimed it may be reading: the blocks stay until those leases have ended.

    Attributes:
        block_ids: the whole block table, already marked as leased in the pool; empty if it was never admitted.
        ok: the KV of the whole prompt is in place.
    """

    request_id: str
    block_ids: list[int]
    ok: bool


class BlocksAllocated(msgspec.Struct, frozen=True):
    """A PullKv request was admitted: its blocks may be filled.

    Attributes:
        block_ids: the block table, for the whole prompt and one more token.
        num_cached_tokens: tokens of the prompt that have their KV in place already (whole blocks, or all of it).
        num_tokens: length of the prompt, so tokens [num_cached_tokens, num_tokens) are wanted; none is possible.
    """

    request_id: str
    block_ids: list[int]
    num_cached_tokens: int
    num_tokens: int


class PullEnded(msgspec.Struct, frozen=True):
    """A PullKv request ended (abort, deadline, failure) before its KV was there: let go of the claim.

    Attributes:
        quarantined: its blocks wait for `Scheduler.read_ended`, which must be called once no read is in progress.
    """

    request_id: str
    quarantined: bool


class ShortOfBlocks(msgspec.Struct, frozen=True):
    """A request waits for room in the pool from now on, or (not `short`) none does any more."""

    short: bool


Event = (
    TokenOut
    | PromptScored
    | Finished
    | Failed
    | ChunkComputed
    | PrefillEnded
    | BlocksAllocated
    | PullEnded
    | ShortOfBlocks
)

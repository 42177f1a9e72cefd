"""A request in progress, as far as the step loop knows more of it than the scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from tandem.engine.outbox import KvEvent
from tandem.kv.blocks import BlockPool
from tandem.scheduling.events import PrefillEnded, PullEnded, TokenOut
from tandem.transfer.decode.pull import Pull
from tandem.wire.messages import Generate, KvTransferParams, Local, Prefill, PullKv, RequestStats, Tokens


@dataclass(slots=True)
class OpenRequest:
    """`publish`: its end tells a foreign proxy where the KV is."""

    frontend: int
    publish: bool
    pull: Pull | None = None
    first_out_at: float | None = None

    def with_transfer(self, stats: RequestStats, pool: BlockPool, transport: str) -> RequestStats:
        """Add what was moved. `handoff_time`: from hearing of the first token to the end of the first step here."""
        pull = self.pull
        if pull is None:
            return stats
        return msgspec.structs.replace(
            stats,
            transfer_time=pull.read_seconds,
            handoff_time=max(0.0, self.first_out_at - pull.final_at) if self.first_out_at else 0.0,
            blocks=pool.blocks_for(pull.announced_tokens) - pull.cached // pool.block_size,
            bytes=pull.bytes,
            descriptors=pull.descriptors,
            transport=transport,
            kv_source=pull.source_engine,
        )


def token_message(
    event: TokenOut, stats: RequestStats | None, params: KvTransferParams | None, *, done: bool
) -> Tokens:
    """Return a token for its frontend. `done`: this engine's part is."""
    return Tokens(
        event.request_id,
        event.index,
        [event.token_id],
        [event.logprobs] if event.logprobs is not None else None,
        event.finish_reason,
        event.stop_token_id,
        done=done,
        stats=stats,
        kv_transfer_params=params,
        digest=event.digest,
    )


def undo_begin(generate: Generate) -> list[KvEvent]:
    """Return what ends the part of a refused request that the event loop has begun."""
    match generate.kv:
        case Prefill():
            return [PrefillEnded(generate.request_id, [], ok=False)]
        case PullKv():
            return [PullEnded(generate.request_id, quarantined=False)]
        case Local():
            return []

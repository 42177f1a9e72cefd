"""The description that an engine gives of itself to another, and the check whether two engines fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from tandem.errors import PeerRefused, WireError
from tandem.ids import EngineIdentity
from tandem.kv.checksums import checksum_layout
from tandem.kv.layout import MOST_BYTES, KvLayout, LayoutError
from tandem.kv.plan import sources_of_all
from tandem.transfer.transports.base import RankEndpoint
from tandem.wire.codec import Codec
from tandem.wire.engine_status import MAX_RANKS
from tandem.wire.fields import Count, Text
from tandem.wire.peer_messages import Envelope, Hello

PROTOCOL = (3, 3)
"""Lowest and highest version of the engine-to-engine protocol that this software speaks."""


class RankDescriptor(msgspec.Struct, frozen=True):
    """One rank: the part of the KV cache it holds, its layout in memory, and the way to reach it.

    Attributes:
        checksums: where in its memory the table of its KV's checksums begins, in bytes; None if it has none.
    """

    rank: Count
    tp_rank: Count
    pp_rank: Count
    node: Text
    layout: KvLayout
    endpoint: RankEndpoint
    checksums: Annotated[int, Meta(ge=0, le=MOST_BYTES)] | None = None


class EngineDescriptor(msgspec.Struct, frozen=True):
    """Everything a peer needs to read KV from an engine, all ranks in one."""

    identity: EngineIdentity
    block_size: Annotated[int, Meta(ge=1)]
    ranks: Annotated[list[RankDescriptor], Meta(min_length=1, max_length=MAX_RANKS)]

    @property
    def blocks(self) -> int:
        """Return the number of blocks that every rank has."""
        return min(rank.layout.blocks for rank in self.ranks)

    @property
    def has_checksums(self) -> bool:
        """Return whether what is read from any rank can be verified."""
        return all(rank.checksums is not None for rank in self.ranks)

    def check(self) -> None:
        """Raise WireError if the ranks are not 0..n-1, or a layout reaches outside of its rank's memory."""
        if [r.rank for r in self.ranks] != list(range(len(self.ranks))):
            raise WireError(f"ranks must be 0 to {len(self.ranks) - 1} in order; got {[r.rank for r in self.ranks]}")
        for rank in self.ranks:
            try:
                rank.layout.check()
                end = 0 if rank.checksums is None else rank.checksums + checksum_layout(rank.layout).nbytes
            except LayoutError as error:
                raise WireError(f"layout of rank {rank.rank}: {error}") from None
            if end > rank.endpoint.region.length:
                raise WireError(f"the checksums of rank {rank.rank} end at {end}, outside of its memory")
            if rank.layout.nbytes > rank.endpoint.region.length:
                raise WireError(
                    f"rank {rank.rank} describes {rank.layout.nbytes} bytes of KV memory"
                    f" but registered only {rank.endpoint.region.length}"
                )
            if rank.layout.block_size != self.block_size:
                raise WireError(
                    f"rank {rank.rank} has block size {rank.layout.block_size}, its engine {self.block_size}"
                )


_DESCRIPTORS: Codec[EngineDescriptor] = Codec(EngineDescriptor)


def check_envelopes(ours: Envelope, theirs: Envelope) -> int:
    """Return the highest protocol version that both speak. Raises PeerRefused, naming the first field that differs."""
    version = min(ours.protocol[1], theirs.protocol[1])
    if version < max(ours.protocol[0], theirs.protocol[0]):
        raise PeerRefused("protocol", _range(ours.protocol), _range(theirs.protocol))
    for field in ("fingerprint", "kv_dtype", "connector"):
        if getattr(ours, field) != getattr(theirs, field):
            raise PeerRefused(field, getattr(ours, field), getattr(theirs, field))
    return version


def check_hello(envelope: Envelope, identity: EngineIdentity, hello: Hello) -> None:
    """Raise PeerRefused if the sender does not fit, or means another engine or incarnation than this one."""
    check_envelopes(envelope, hello.envelope)
    if hello.expected_engine_id != identity.engine_id:
        raise PeerRefused("engine_id", identity.engine_id, hello.expected_engine_id)
    if hello.expected_incarnation not in (None, identity.incarnation):
        raise PeerRefused("incarnation", identity.incarnation, str(hello.expected_incarnation))


def _range(versions: tuple[int, int]) -> str:
    return f"{versions[0]} to {versions[1]}"


def decode_descriptor(raw: msgspec.Raw) -> EngineDescriptor:
    """Decode strictly. Raises WireError."""
    try:
        descriptor = _DESCRIPTORS.decode(memoryview(raw))
    except WireError as error:
        raise WireError(f"the peer's description cannot be read: {error}") from None
    descriptor.check()
    return descriptor


def peers_needed(
    sources: Sequence[RankDescriptor], readers: Sequence[KvLayout], *, turn: int = 0
) -> list[list[RankDescriptor]]:
    """Return the source ranks that each of our ranks reads from; `turn` as for `plan`.

    Raises PeerRefused if nobody holds something that is needed.
    """
    try:
        chosen = sources_of_all([s.layout for s in sources], readers, turn=turn)
    except LayoutError as error:
        raise PeerRefused("layout", "what our ranks need", str(error)) from None
    return [[sources[index] for index in one] for one in chosen]

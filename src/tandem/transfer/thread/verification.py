"""Verified reads: the checksums that a source has computed travel beside the KV and are compared with what arrived."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from tandem.kv.checksums import Mismatch, checksum_layout, with_checksums
from tandem.kv.layout import KvLayout, LayoutError
from tandem.kv.plan import TransferPlan, plan
from tandem.kv.runs import Runs
from tandem.transfer.handshake import RankDescriptor
from tandem.transfer.thread.thread_messages import ReadOrder

PIECE_BYTES = 4 * 1024 * 1024
"""KV that is verified at a time; between pieces the transfer thread does what else there is to do."""


class Verifier(Protocol):
    """Computes checksums of this rank's KV memory.

    Attributes:
        offset: bytes from the beginning of the registered memory to the table of checksums.
        token_bytes: bytes of one token in this rank's memory.
    """

    @property
    def offset(self) -> int: ...

    @property
    def token_bytes(self) -> int: ...

    def mismatches(self, blocks: Sequence[int], start: int, stop: int) -> list[Mismatch]:
        """Return what of tokens [start, stop) of a request does not fit the table."""


@dataclass(frozen=True, slots=True)
class PeerReads:
    """The reads of one rank from a peer engine: whom it reads from, and what.

    Attributes:
        checksums: the plan for the tables, if reads are verified, and where they begin: in each source, and here.
    """

    agents: list[str]
    _kv: TransferPlan
    _checksums: tuple[TransferPlan, list[int], int] | None = None

    @classmethod
    def of(
        cls, sources: Sequence[RankDescriptor], layouts: Sequence[KvLayout], rank: int, verifier: Verifier | None
    ) -> PeerReads:
        """Plan them for `layouts[rank]`. Raises LayoutError."""
        agents = [source.endpoint.agent for source in sources]
        kv = plan([source.layout for source in sources], layouts, rank)
        if verifier is None:
            return cls(agents, kv)
        offsets = [source.checksums for source in sources if source.checksums is not None]
        if len(offsets) < len(sources):
            raise LayoutError("checksums", "a table on every rank of the source", "none")
        tables = [checksum_layout(source.layout) for source in sources]
        checksums = plan(tables, [checksum_layout(layout) for layout in layouts], rank)
        return cls(agents, kv, (checksums, offsets, verifier.offset))

    def runs(self, order: ReadOrder) -> list[tuple[str, Runs]]:
        """Return what an order reads, by agent. Raises LayoutError."""
        blocks = order.source_blocks, order.destination_blocks
        found = self._kv.runs(*blocks, order.start, order.stop, whole_tail=order.last)
        if self._checksums is not None:
            tables, offsets, own_offset = self._checksums
            beside = tables.runs(*blocks, order.start, order.stop, whole_tail=order.last)
            found = {
                source: with_checksums(runs, beside[source], offsets[source], own_offset)
                for source, runs in found.items()
            }
        return [(self.agents[source], runs) for source, runs in found.items()]


class Verification:
    """The verification of one read order that has ended, piece by piece."""

    def __init__(self, order: ReadOrder, verifier: Verifier) -> None:
        self._order = order
        self._verifier = verifier
        self._next = order.start
        self._piece = max(1, PIECE_BYTES // verifier.token_bytes)

    @property
    def ended(self) -> bool:
        return self._next >= self._order.stop

    def go_on(self) -> str | None:
        """Verify one more piece. Return what is wrong with it; the rest does not matter then."""
        start = self._next
        self._next = min(start + self._piece, self._order.stop)
        wrong = self._verifier.mismatches(self._order.destination_blocks, start, self._next)
        if not wrong:
            return None
        self._next = self._order.stop
        return _description(self._order.request_id, wrong)


def _description(request_id: str, wrong: Sequence[Mismatch]) -> str:
    first = wrong[0]
    heads, layers = {one.head for one in wrong}, {one.layer for one in wrong}
    return (
        f"{len(wrong)} checksums of its KV do not fit what was read: in block {first.block} from token {first.position}"
        f" on, heads {min(heads)} to {max(heads)}, layers {min(layers)} to {max(layers)} (request {request_id})"
    )

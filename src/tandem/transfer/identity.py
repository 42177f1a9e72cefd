"""The identity of an engine: agreed once, over all of its ranks, before any connector exists.

Every rank submits one record; the records are gathered on every rank in one collective, and every rank compares all
of them in the same way. So all ranks come to the same end: the identity that the leader made, or the same error.
Connectors, scheduler and published descriptors take the identity from here and from nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from tandem.errors import StartError
from tandem.ids import EngineIdentity
from tandem.wire.engine_status import MAX_RANKS, RankInfo
from tandem.wire.fields import Count, Name, Text

COMPARED = (
    "engine_id",
    "role",
    "model",
    "model_files",
    "dtype",
    "device",
    "tp",
    "pp",
    "nnodes",
    "block_size",
    "max_model_len",
    "connector",
    "protocol",
    "version",
    "cluster_key",
    "verify_kv",
)


class World(Protocol):
    """All ranks of an engine (TP x PP, every node)."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather(self, data: bytes) -> list[bytes]:
        """The data of all ranks by rank, in one collective."""


class RankRecord(msgspec.Struct, frozen=True):
    """The configuration of a rank, and the place where it runs.

    Attributes:
        engine_id: as configured; None if it was not.
        role: what the engine is used for.
        model_files: what is known of the model without reading its weights; a digest.
        cluster_key: fingerprint of the key.
        openmp, threads: the runtime that it computes with on the CPU, and in how many threads.
        identity: made by the leader; only rank 0's is there.
    """

    rank: Count
    tp_rank: Count
    pp_rank: Count
    node_rank: Count
    host: Text
    pid: Count
    engine_id: Name | None
    model: Text
    model_files: Text
    dtype: Name
    device: Name
    tp: Count
    pp: Count
    nnodes: Count
    block_size: Count
    max_model_len: Count
    connector: Name
    protocol: tuple[Count, Count]
    version: Text
    role: Name = "mixed"
    cluster_key: Name = "none"
    verify_kv: bool = False
    openmp: Name = "none"
    threads: Count = 1
    identity: EngineIdentity | None = None

    @property
    def node(self) -> str:
        return f"node {self.node_rank} ({self.host})"


class Agreement(msgspec.Struct, frozen=True):
    """The identity and records that all ranks agree on; `seconds`: the exchange took on this rank."""

    identity: EngineIdentity
    records: list[RankRecord]
    seconds: float = 0.0

    @property
    def ranks(self) -> list[RankInfo]:
        """Return the ranks as GET /tandem/engine shows them."""
        engine_id, incarnation = self.identity.engine_id, self.identity.incarnation
        return [
            RankInfo(r.rank, r.tp_rank, r.pp_rank, r.host, r.pid, engine_id, incarnation, r.openmp, r.threads)
            for r in self.records
        ]


def agree(world: World, record: RankRecord) -> Agreement:
    """Exchange records with all ranks. Raises StartError, on all ranks alike, if they disagree."""
    began = time.monotonic()
    gathered = world.all_gather(msgspec.msgpack.encode(record))
    seconds = time.monotonic() - began
    try:
        records = [msgspec.msgpack.decode(data, type=RankRecord) for data in gathered]
    except msgspec.DecodeError as error:
        raise StartError(f"a rank sent a record that cannot be read, so it runs another version: {error}") from None
    check_agreement(records)
    identity = records[0].identity
    if identity is None or len(records) > MAX_RANKS:
        raise StartError("rank 0 sent no identity")
    return Agreement(identity, records, seconds)


def check_agreement(records: Sequence[RankRecord], fields: Sequence[str] = COMPARED) -> None:
    """Raise StartError with one line that names the nodes, the field and both values, if any two differ."""
    first = records[0]
    for field in fields:
        expected = getattr(first, field)
        for record in records:
            value = getattr(record, field)
            if value != expected:
                raise StartError(
                    f"the nodes of this engine disagree on {field}: {first.node} has {_show(expected)},"
                    f" {record.node} has {_show(value)}; start every node with the same"
                )


def _show(value: object) -> str:
    return "none" if value is None else str(value)

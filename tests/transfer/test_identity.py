"""All ranks come to one identity, or to one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from tandem.errors import ConfigError, StartError
from tandem.ids import new_identity
from tandem.transfer.identity import COMPARED, RankRecord, agree

SIZE = 4


@dataclass
class Gathered:
    """What one rank sees of a collective in which the others have sent `all_data` already."""

    rank: int
    all_data: Sequence[bytes]
    calls: int = 0

    @property
    def size(self) -> int:
        return len(self.all_data)

    def all_gather(self, data: bytes) -> list[bytes]:
        self.calls += 1
        assert self.all_data[self.rank] == data
        return list(self.all_data)


def record(rank: int, **fields: Any) -> RankRecord:
    """Rank of a TP 2, PP 2 engine on two nodes."""
    plain: dict[str, Any] = dict(
        rank=rank, tp_rank=rank % 2, pp_rank=rank // 2, node_rank=rank // 2, host=f"host{rank // 2}", pid=100 + rank,
        engine_id="p0", model="m", model_files="f", dtype="float32", tp=2, pp=2, nnodes=2, block_size=16,
        max_model_len=64, connector="tcp", protocol=(1, 1), version="1", device="cpu", identity=None,
    )  # fmt: skip
    return RankRecord(**(plain | fields))


def everybody(**of_rank_3: Any) -> list[RankRecord]:
    others = [record(rank) for rank in range(1, SIZE - 1)]
    return [record(0, identity=new_identity("p0")), *others, record(SIZE - 1, **of_rank_3)]


def outcomes(records: Sequence[RankRecord]) -> list[Any]:
    """What `agree` returns or raises on each rank, which exchanges records once."""
    data = [msgspec.msgpack.encode(r) for r in records]
    found: list[Any] = []
    for rank, own in enumerate(records):
        world = Gathered(rank, data)
        try:
            found.append(agree(world, own).identity)
        except StartError as error:
            found.append(str(error))
        assert world.calls == 1
    return found


def test_all_ranks_take_the_identity_that_rank_0_made_in_one_exchange() -> None:
    records = everybody()
    assert outcomes(records) == [records[0].identity] * SIZE


OTHER = {
    "engine_id": "p1", "model": "n", "model_files": "g", "dtype": "bfloat16", "tp": 4, "pp": 1, "nnodes": 1,
    "block_size": 32, "max_model_len": 65, "connector": "nixl", "protocol": (1, 2), "version": "2",
    "device": "cuda", "cluster_key": "0badc0de", "role": "decode", "verify_kv": True,
}  # fmt: skip


@pytest.mark.parametrize("field", COMPARED)
def test_a_disagreement_is_one_error_on_all_ranks_that_names_nodes_field_and_values(field: str) -> None:
    records = everybody(**{field: OTHER[field]})
    found = outcomes(records)
    assert len(set(found)) == 1
    for word in ("node 0 (host0)", "node 1 (host1)", field, str(getattr(records[0], field)), str(OTHER[field])):
        assert word in found[0]


def test_an_id_on_one_node_only_is_a_disagreement_too() -> None:
    found = outcomes(everybody(engine_id=None))
    assert "has none" in found[0]
    assert len(set(found)) == 1


def test_a_record_of_another_version_is_an_error_on_all_ranks() -> None:
    records = everybody()
    data = [msgspec.msgpack.encode(r) for r in records]
    data[2] = msgspec.msgpack.encode({"rank": 2, "something": "new"})
    for rank in (0, 1, 3):
        with pytest.raises(StartError, match="another version"):
            agree(Gathered(rank, data), records[rank])


def test_an_identity_that_rank_0_did_not_make_is_an_error() -> None:
    records = [record(rank) for rank in range(SIZE)]
    assert outcomes(records) == ["rank 0 sent no identity"] * SIZE


def test_the_ranks_are_shown_with_the_agreed_identity() -> None:
    records = everybody()
    data = [msgspec.msgpack.encode(r) for r in records]
    ranks = agree(Gathered(1, data), records[1]).ranks
    assert [(r.rank, r.tp_rank, r.pp_rank, r.node, r.pid) for r in ranks] == [
        (0, 0, 0, "host0", 100), (1, 1, 0, "host0", 101), (2, 0, 1, "host1", 102), (3, 1, 1, "host1", 103),
    ]  # fmt: skip
    identity = records[0].identity
    assert identity is not None
    assert {(r.engine_id, r.incarnation) for r in ranks} == {(identity.engine_id, identity.incarnation)}


def test_every_incarnation_is_new_also_under_a_configured_id() -> None:
    first, second = new_identity("p0"), new_identity("p0")
    assert first.engine_id == second.engine_id == "p0"
    assert first.incarnation != second.incarnation
    assert new_identity(None).engine_id != new_identity(None).engine_id


@pytest.mark.parametrize("engine_id", ["", "a b", "x" * 65, "a/b", "é"])
def test_an_id_that_cannot_be_written_everywhere_is_refused(engine_id: str) -> None:
    with pytest.raises(ConfigError, match="--engine-id"):
        new_identity(engine_id)

"""Ranks meet over a file or over TCP; whatever goes wrong is one sentence on all of them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from tandem.engine.start import rendezvous
from tandem.engine.start.rendezvous import meet
from tandem.errors import StartError
from tandem.transfer.identity import RankRecord
from tests.engine.start.conftest import PATIENCE, OpenStore

SOON = 1.0


def record(rank: int, nnodes: int = 2, **fields: Any) -> RankRecord:
    """Of a TP 4 engine on `nnodes` nodes."""
    plain: dict[str, Any] = dict(
        rank=rank, tp_rank=rank, pp_rank=0, node_rank=rank * nnodes // 4, host=f"host{rank * nnodes // 4}",
        pid=100 + rank, engine_id=None, model="m", model_files="f", dtype="float32", tp=4, pp=1, nnodes=nnodes,
        block_size=16, max_model_len=64, connector="tcp", protocol=(1, 1), version="1", device="cpu",
    )  # fmt: skip
    return RankRecord(**(plain | fields))


def outcomes(open_it: OpenStore, records: list[RankRecord], timeout: float = PATIENCE) -> list[str | None]:
    """The error of each rank, or None."""

    def one(own: RankRecord) -> str | None:
        try:
            meet(open_it(own.rank), own, 4, timeout)
        except StartError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(records)) as pool:
        return list(pool.map(one, records))


def test_ranks_that_fit_meet_in_whatever_order_they_come(open_it: OpenStore) -> None:
    assert outcomes(open_it, [record(rank) for rank in (2, 0, 3, 1)]) == [None] * 4


def test_ranks_that_are_missing_are_named_to_all_who_came(open_it: OpenStore) -> None:
    found = outcomes(open_it, [record(0), record(1)], timeout=SOON)
    assert found[0] == found[1]
    for words in ("ranks 2, 3 of node 1 did not come", "node 0 (host0)", "all 2 nodes"):
        assert words in (found[0] or "")


@pytest.mark.parametrize("field", ["nnodes", "tp", "pp", "version", "device"])
def test_a_shape_that_differs_is_told_to_all_at_once(open_it: OpenStore, field: str) -> None:
    other: Any = {"nnodes": 4, "tp": 8, "pp": 2, "version": "2", "device": "cuda"}[field]
    records = [record(0), record(1), msgspec.structs.replace(record(2), **{field: other})]
    found = outcomes(open_it, records)
    assert len(set(found)) == 1
    for words in (f"disagree on {field}", "node 0 (host0)", "node 1 (host1)", str(other)):
        assert words in (found[0] or "")


def test_a_rank_that_was_started_twice_is_told_to_all(open_it: OpenStore) -> None:
    found = outcomes(open_it, [record(0), record(1), record(1, pid=999, node_rank=1, host="host9")])
    assert len(set(found)) == 1
    for words in ("one rank was started twice", "pid 101", "pid 999", "host9"):
        assert words in (found[0] or "")


def test_a_twin_that_comes_too_late_is_told_who_runs_and_disturbs_nobody(open_it: OpenStore) -> None:
    store = open_it(0)  # lives on
    together = lambda rank: store if rank == 0 else open_it(rank)  # noqa: E731
    assert outcomes(together, [record(rank) for rank in range(4)]) == [None] * 4
    [error] = outcomes(open_it, [record(3, pid=999)])
    assert "is whole already" in (error or "")
    assert "pid 103" in (error or "")
    assert "pid 999" in (error or "")


def test_a_stranger_in_the_store_ends_the_start_with_a_sentence(
    open_it: OpenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "LAST_WORD_SECONDS", 0.5)  # the stranger will never have heard
    store = open_it(0)
    store.set(f"arrival/{store.add('arrivals', 1)}", "not a rank")
    found = outcomes(lambda rank: store if rank == 0 else open_it(rank), [record(0), record(1)])
    assert len(set(found)) == 1
    assert "not a rank of this version" in (found[0] or "")


def test_a_rank_that_is_never_told_ends_in_bounded_time(open_it: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LAST_WORD_SECONDS", 0.1)
    store = open_it(0)  # there, but it judges nobody
    [error] = outcomes(open_it, [record(1)], timeout=0.2)
    assert "node 0 did not say" in (error or "")
    del store

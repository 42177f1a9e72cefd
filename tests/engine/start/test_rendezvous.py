"""Ranks meet over a file or over TCP; whatever goes wrong is one sentence on all of them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tandem.engine.start import rendezvous
from tandem.engine.start.rendezvous import StartFailureWatch, meet, open_store
from tandem.errors import StartError
from tandem.transfer.identity import RankRecord
from tandem.wire.messages import Address

PATIENCE = 20.0
SOON = 1.0


def record(rank: int, nnodes: int = 2, **fields: Any) -> RankRecord:
    """Of a TP 4 engine on `nnodes` nodes."""
    plain: dict[str, Any] = dict(
        rank=rank, tp_rank=rank, pp_rank=0, node_rank=rank * nnodes // 4, host=f"host{rank * nnodes // 4}",
        pid=100 + rank, engine_id=None, model="m", fingerprint="f", dtype="float32", tp=4, pp=1, nnodes=nnodes,
        block_size=16, max_model_len=64, connector="tcp", protocol=(1, 1), version="1", device="cpu",
    )  # fmt: skip
    return RankRecord(**(plain | fields))


Open = Callable[[int], Any]


@pytest.fixture(params=["file", "tcp"])
def open_it(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens a rank's connection to one store. Rank 0's, if it serves, lives until the test ends."""
    kept: list[Any] = []
    lock = threading.Lock()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def open_one(rank: int) -> Any:
        if request.param == "file":
            return open_store(None, str(tmp_path / "meeting"), rank, PATIENCE)
        store = open_store(Address("127.0.0.1", port), None, rank, PATIENCE)
        with lock:
            kept.append(store)
        return store

    yield open_one
    kept.clear()


def outcomes(open_it: Open, records: list[RankRecord], timeout: float = PATIENCE) -> list[str | None]:
    """What each rank was told: None, or the error."""

    def one(own: RankRecord) -> str | None:
        try:
            meet(open_it(own.rank), own, 4, timeout)
        except StartError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(records)) as pool:
        return list(pool.map(one, records))


def test_ranks_that_fit_meet_in_whatever_order_they_come(open_it: Open) -> None:
    assert outcomes(open_it, [record(rank) for rank in (2, 0, 3, 1)]) == [None] * 4


def test_ranks_that_are_missing_are_named_to_all_who_came(open_it: Open) -> None:
    found = outcomes(open_it, [record(0), record(1)], timeout=SOON)
    assert found[0] == found[1]
    for words in ("ranks 2, 3 of node 1 did not come", "node 0 (host0)", "all 2 nodes"):
        assert words in (found[0] or "")


@pytest.mark.parametrize("field", ["nnodes", "tp", "pp", "version", "device"])
def test_a_shape_that_differs_is_told_to_all_at_once(open_it: Open, field: str) -> None:
    other = {"nnodes": 4, "tp": 8, "pp": 2, "version": "2", "device": "cuda"}[field]
    records = [record(0), record(1), record(2, node_rank=1, host="host1", **{field: other})]
    found = outcomes(open_it, records)
    assert len(set(found)) == 1
    for words in (f"disagree on {field}", "node 0 (host0)", "node 1 (host1)", str(other)):
        assert words in (found[0] or "")


def test_a_rank_that_was_started_twice_is_told_to_all(open_it: Open) -> None:
    found = outcomes(open_it, [record(0), record(1), record(1, pid=999, node_rank=1, host="host9")])
    assert len(set(found)) == 1
    for words in ("one rank was started twice", "pid 101", "pid 999", "host9"):
        assert words in (found[0] or "")


def test_a_twin_that_comes_too_late_is_told_who_runs_and_disturbs_nobody(open_it: Open) -> None:
    store = open_it(0)  # lives on
    together = lambda rank: store if rank == 0 else open_it(rank)  # noqa: E731
    assert outcomes(together, [record(rank) for rank in range(4)]) == [None] * 4
    [error] = outcomes(open_it, [record(3, pid=999)])
    assert "is whole already" in (error or "")
    assert "pid 103" in (error or "")
    assert "pid 999" in (error or "")


def test_a_stranger_in_the_store_ends_the_start_with_a_sentence(open_it: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LAST_WORD_SECONDS", 0.5)  # the stranger will never have heard
    store = open_it(0)
    store.set(f"arrival/{store.add('arrivals', 1)}", "not a rank")
    found = outcomes(lambda rank: store if rank == 0 else open_it(rank), [record(0), record(1)])
    assert len(set(found)) == 1
    assert "not a rank of this version" in (found[0] or "")


def test_a_rank_that_is_never_told_ends_in_bounded_time(open_it: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LAST_WORD_SECONDS", 0.1)
    store = open_it(0)  # there, but it judges nobody
    [error] = outcomes(open_it, [record(1)], timeout=0.2)
    assert "node 0 did not say" in (error or "")
    del store


def test_a_master_that_is_not_there_is_an_error_in_bounded_time() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # not listening
        master = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(StartError, match=r"could not be reached within 0 s .*is node 0 started"):
            open_store(master, None, 1, 0.3)


def test_a_master_port_that_is_taken_is_an_error_of_node_0() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        master = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(StartError, match="node 0 cannot listen on --master"):
            open_store(master, None, 0, 1.0)


# --- shared fate ---------------------------------------------------------------------------------------------------


class Told:
    def __init__(self) -> None:
        self.texts: list[str] = []
        self.event = threading.Event()

    def __call__(self, text: str) -> None:
        self.texts.append(text)
        self.event.set()


def test_a_rank_that_fails_tells_the_others_and_not_itself(open_it: Open) -> None:
    told = [Told() for _ in range(3)]
    fates = [StartFailureWatch(open_it(rank), 2, told[rank]) for rank in range(3)]
    fates[1].fail("rank 1 on host0: no weights", serves_store=False)
    for rank in (0, 2):
        assert told[rank].event.wait(PATIENCE)
        assert told[rank].texts == ["rank 1 on host0: no weights"]
    assert told[1].texts == []


def test_who_has_started_is_not_taken_along(open_it: Open) -> None:
    done, waits, late = Told(), Told(), Told()
    fates = [StartFailureWatch(open_it(rank), 2, told) for rank, told in enumerate((done, waits, late))]
    fates[0].end()
    fates[2].fail("too late", serves_store=False)
    assert waits.event.wait(PATIENCE)
    assert done.texts == []


def test_who_serves_the_store_goes_once_all_others_know(open_it: Open) -> None:
    """Also where some of them fail by themselves meanwhile, and need not be told."""
    store = open_it(0)
    told = [Told() for _ in range(3)]
    fates = [
        StartFailureWatch(store.clone(), 2, told[0]),
        *(StartFailureWatch(open_it(rank), 2, told[rank]) for rank in (1, 2)),
    ]
    fates[2].fail("rank 2 on host1: no weights", serves_store=False)
    fates[0].fail("rank 0 on host0: no weights", serves_store=True)
    assert store.add("fate", 0) == 3
    assert told[1].event.wait(PATIENCE)
    assert told[2].texts == []


def test_the_first_reason_is_the_one_that_is_told(open_it: Open) -> None:
    """Later ones are its consequences: a collective with a rank that has gone."""
    told = [Told() for _ in range(3)]
    fates = [StartFailureWatch(open_it(rank), 2, told[rank]) for rank in range(2)]
    fates[1].fail("rank 1 on host0: no weights", serves_store=False)
    fates[0].fail("rank 0 on host0: connection closed by peer", serves_store=False)
    late = StartFailureWatch(open_it(2), 2, told[2])
    assert told[2].event.wait(PATIENCE)
    assert told[2].texts == ["rank 1 on host0: no weights"]
    late.end()

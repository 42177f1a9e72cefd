"""A rank that fails while the engine starts ends the others, and tells them why."""

from __future__ import annotations

import socket
import threading

import pytest

from tandem.engine.start.start_failure import StartFailureWatch
from tandem.engine.store import clone
from tandem.errors import RankLost, StartError, TandemError
from tests.engine.start.conftest import PATIENCE, OpenStore

HOST = socket.gethostname()
NO_WEIGHTS = StartError("no weights")


class Told:
    """The errors with which a rank was told to end."""

    def __init__(self) -> None:
        self.errors: list[TandemError] = []
        self._event = threading.Event()

    def __call__(self, error: TandemError) -> None:
        self.errors.append(error)
        self._event.set()

    @property
    def texts(self) -> list[str]:
        return [str(error) for error in self.errors]

    def wait(self) -> bool:
        return self._event.wait(PATIENCE)


def ended(watch: StartFailureWatch) -> StartError:
    watch.end()
    return NO_WEIGHTS


def test_a_rank_that_fails_tells_the_others_and_not_itself(open_it: OpenStore) -> None:
    told = [Told() for _ in range(3)]
    watches = [StartFailureWatch(open_it(rank), rank, 3, told[rank]) for rank in range(3)]
    watches[1].fail(NO_WEIGHTS)
    for rank in (0, 2):
        assert told[rank].wait()
        assert told[rank].texts == [f"rank 1 on {HOST}: no weights"]
    assert told[1].errors == []


def test_an_error_that_leaves_the_body_is_this_ranks_failure(open_it: OpenStore) -> None:
    store, told = open_it(0), Told()
    StartFailureWatch(clone(store), 0, 2, told)
    with pytest.raises(ZeroDivisionError), StartFailureWatch(open_it(1), 1, 2, Told()):
        raise ZeroDivisionError("a bug")
    assert told.wait()
    assert told.texts == [f"rank 1 on {HOST}: ZeroDivisionError: a bug"]


def test_an_error_after_the_start_is_told_by_other_means(open_it: OpenStore) -> None:
    store, told = open_it(0), Told()
    watch = StartFailureWatch(open_it(1), 1, 2, told)
    with pytest.raises(StartError), watch:
        raise ended(watch)
    assert not store.check(["failure"])
    assert told.errors == []


def test_the_loss_of_a_rank_is_no_root_cause_to_others_either(open_it: OpenStore) -> None:
    told = Told()
    watch = StartFailureWatch(open_it(0), 0, 3, told)
    StartFailureWatch(open_it(1), 1, 3, Told()).fail(RankLost("rank 2 of this engine was lost"))
    assert told.wait()
    assert [type(error) for error in told.errors] == [RankLost]
    watch.end()


def test_who_lost_a_rank_lets_that_rank_tell_why(open_it: OpenStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_it(0)
    lost = StartFailureWatch(clone(store), 0, 3, Told())
    monkeypatch.setattr("time.sleep", lambda _: StartFailureWatch(store, 2, 3, Told()).fail(NO_WEIGHTS))
    with pytest.raises(RankLost), lost:
        raise RankLost("connection closed by peer")
    assert b"rank 2" in store.get("failure")


def test_who_has_started_is_not_taken_along(open_it: OpenStore) -> None:
    done, waits, late = Told(), Told(), Told()
    watches = [StartFailureWatch(open_it(rank), rank, 3, told) for rank, told in enumerate((done, waits, late))]
    watches[0].end()
    watches[2].fail(NO_WEIGHTS)
    assert waits.wait()
    assert done.errors == []


def test_who_serves_the_store_goes_once_all_others_know(open_it: OpenStore) -> None:
    """Also where some of them fail by themselves meanwhile, and need not be told."""
    store = open_it(0)
    told = [Told() for _ in range(3)]
    watches = [
        StartFailureWatch(clone(store), 0, 3, told[0]),
        *(StartFailureWatch(open_it(rank), rank, 3, told[rank]) for rank in (1, 2)),
    ]
    watches[2].fail(NO_WEIGHTS)
    watches[0].fail(NO_WEIGHTS)
    assert store.add("failure heard", 0) == 3
    assert told[1].wait()
    assert told[2].errors == []


def test_the_first_reason_is_the_one_that_is_told(open_it: OpenStore) -> None:
    """Later ones are its consequences: a collective with a rank that has gone."""
    told = [Told() for _ in range(3)]
    store = open_it(0)
    first, second = (StartFailureWatch(open_it(rank), rank, 3, told[rank]) for rank in (1, 2))
    first.fail(NO_WEIGHTS)
    second.fail(RankLost("connection closed by peer"))
    late = StartFailureWatch(clone(store), 0, 3, told[0])
    assert told[0].wait()
    assert told[0].texts == [f"rank 1 on {HOST}: no weights"]
    late.end()

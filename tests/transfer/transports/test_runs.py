from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import TransferError
from tandem.transfer.transports.runs import Runs, checked_runs

SIZE = 200


@st.composite
def run_triples(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    lengths = draw(st.lists(st.integers(0, 40), max_size=12))
    return [(draw(st.integers(0, SIZE - n)), draw(st.integers(0, SIZE - n)), n) for n in lengths]


def copied(runs: list[Runs]) -> np.ndarray:
    source, destination = np.arange(SIZE), np.full(SIZE, -1)
    for part in runs:
        for s, d, n in zip(part.source, part.destination, part.length, strict=True):
            destination[d : d + n] = source[s : s + n]
    return destination


@settings(max_examples=200, deadline=None)
@given(run_triples(), st.integers(1, 100), st.integers(1, 6))
def test_pieces_carry_the_same_bytes_in_the_same_order_within_both_limits(
    triples: list[tuple[int, int, int]], max_bytes: int, max_runs: int
) -> None:
    table = np.array(triples, dtype=np.int64).reshape(-1, 3)
    runs = checked_runs(table[:, 0], table[:, 1], table[:, 2], SIZE, SIZE)
    pieces = list(runs.pieces(max_bytes, max_runs))
    assert np.array_equal(copied(pieces), copied([runs]))
    assert sum(piece.bytes for piece in pieces) == runs.bytes
    for piece in pieces:
        assert 0 < piece.bytes <= max_bytes
        assert 0 < piece.count <= max_runs


def test_pieces_are_as_large_as_they_may_be() -> None:
    runs = checked_runs([0, 10, 20, 30], [0, 10, 20, 30], [10, 10, 10, 10], SIZE, SIZE)
    assert [piece.bytes for piece in runs.pieces(20, 99)] == [20, 20]
    assert [piece.count for piece in runs.pieces(99, 3)] == [3, 1]
    assert [piece.bytes for piece in runs.pieces(7, 99)] == [7, 3, 7, 3, 7, 3, 7, 3]


@pytest.mark.parametrize(
    ("source", "destination", "length"),
    [
        ([-1], [0], [1]),
        ([0], [-1], [1]),
        ([0], [0], [-1]),
        ([SIZE], [0], [1]),
        ([0], [SIZE - 1], [2]),
        ([2**63 - 1], [0], [2**63 - 1]),
        ([0], [2**62], [2**62]),
    ],
)
def test_runs_outside_are_refused(source: list[int], destination: list[int], length: list[int]) -> None:
    with pytest.raises(TransferError, match="outside"):
        checked_runs(source, destination, length, SIZE, SIZE)


@pytest.mark.parametrize(
    ("source", "destination", "length"),
    [([0, 0], [0], [1]), ([0.5], [0], [1]), ([[0]], [[0]], [[1]]), (["a"], [0], [1]), (0, 0, 1)],
)
def test_what_is_no_list_of_runs_is_refused(source: object, destination: object, length: object) -> None:
    with pytest.raises(TransferError, match="three integer vectors"):
        checked_runs(source, destination, length, SIZE, SIZE)  # type: ignore[arg-type]

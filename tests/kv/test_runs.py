"""Runs: what may be built, and how they are cut into pieces."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tandem.kv.runs import Runs

SIZE = 200


def runs_of(*triples: tuple[int, int, int]) -> Runs:
    return Runs(*np.array(triples, dtype=np.int64).reshape(-1, 3).T)


@st.composite
def any_runs(draw: st.DrawFn) -> Runs:
    lengths = draw(st.lists(st.integers(1, 40), max_size=12))
    return runs_of(*((draw(st.integers(0, SIZE - n)), draw(st.integers(0, SIZE - n)), n) for n in lengths))


def copied(pieces: list[Runs]) -> NDArray[np.int64]:
    source, destination = np.arange(SIZE), np.full(SIZE, -1)
    for piece in pieces:
        for s, d, n in zip(piece.src_offset, piece.dst_offset, piece.length, strict=True):
            destination[d : d + n] = source[s : s + n]
    return destination


@settings(max_examples=200, deadline=None)
@given(any_runs(), st.integers(1, 100), st.integers(1, 6))
def test_pieces_carry_the_same_bytes_in_the_same_order_within_both_limits(
    runs: Runs, max_bytes: int, max_runs: int
) -> None:
    pieces = list(runs.pieces(max_bytes, max_runs))
    assert np.array_equal(copied(pieces), copied([runs]))
    assert sum(piece.nbytes for piece in pieces) == runs.nbytes
    for piece in pieces:
        assert 0 < piece.nbytes <= max_bytes
        assert 0 < len(piece) <= max_runs


def test_pieces_are_as_large_as_they_may_be() -> None:
    runs = runs_of(*((start, start, 10) for start in (0, 10, 20, 30)))
    assert [piece.nbytes for piece in runs.pieces(20, 99)] == [20, 20]
    assert [len(piece) for piece in runs.pieces(99, 3)] == [3, 1]
    assert [piece.nbytes for piece in runs.pieces(7, 99)] == [7, 3, 7, 3, 7, 3, 7, 3]


@pytest.mark.parametrize(
    ("source", "destination", "length"),
    [([0, 0], [0], [1]), ([0.5], [0], [1]), ([[0]], [[0]], [[1]]), (["a"], [0], [1]), (0, 0, 1)],
)
def test_what_is_no_list_of_runs_is_refused(source: object, destination: object, length: object) -> None:
    with pytest.raises(ValueError, match="three int64 vectors of one length"):
        Runs(np.array(source), np.array(destination), np.array(length))

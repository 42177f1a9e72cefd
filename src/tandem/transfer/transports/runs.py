"""Runs of bytes between two regions: checked, and cut into pieces of bounded size. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tandem.errors import TransferError


@dataclass(frozen=True, slots=True)
class Runs:
    """`length[i]` bytes from `source[i]` to `destination[i]`: three int64 vectors of one length, offsets in bytes.

    Made by `checked_runs` and `Runs.pieces` only, so the runs of one are inside of both regions.
    """

    source: NDArray[np.int64]
    destination: NDArray[np.int64]
    length: NDArray[np.int64]

    @property
    def count(self) -> int:
        return len(self.length)

    @property
    def bytes(self) -> int:
        return int(self.length.sum())

    def pieces(self, max_bytes: int, max_runs: int) -> Iterator[Runs]:
        """The same bytes in the same order, each piece within both limits; longer runs are cut."""
        runs = self._cut(max_bytes)
        ends = np.cumsum(runs.length)
        start = 0
        while start < runs.count:
            limit = ends[start] - runs.length[start] + max_bytes
            stop = min(int(np.searchsorted(ends, limit, side="right")), start + max_runs)
            part = slice(start, stop)
            yield Runs(runs.source[part], runs.destination[part], runs.length[part])
            start = stop

    def _cut(self, max_bytes: int) -> Runs:
        """Every run that is longer than `max_bytes` in parts of that length and a rest."""
        if not self.count or int(self.length.max()) <= max_bytes:
            return self
        parts = -(-self.length // max_bytes)
        first_part = np.cumsum(parts) - parts
        nth_part = np.arange(int(parts.sum()), dtype=np.int64) - np.repeat(first_part, parts)
        skip = nth_part * max_bytes
        return Runs(
            np.repeat(self.source, parts) + skip,
            np.repeat(self.destination, parts) + skip,
            np.minimum(np.repeat(self.length, parts) - skip, max_bytes),
        )


def checked_runs(
    source: ArrayLike, destination: ArrayLike, length: ArrayLike, source_bytes: int, destination_bytes: int
) -> Runs:
    """Runs that read from a region of `source_bytes` into one of `destination_bytes`; empty ones are left out.

    Raises:
        TransferError: not three integer vectors of one length, or a run that is not inside of both regions.
    """
    vectors = [np.asarray(values) for values in (source, destination, length)]
    shapes = {vector.shape for vector in vectors}
    if len(shapes) != 1 or vectors[0].ndim != 1 or any(v.size and v.dtype.kind not in "iu" for v in vectors):
        raise TransferError(
            "runs must be three integer vectors of one length; got "
            + ", ".join(f"{vector.dtype}{list(vector.shape)}" for vector in vectors)
        )
    sources, destinations, lengths = (vector.astype(np.int64) for vector in vectors)
    require_inside(sources, lengths, source_bytes, "source")
    require_inside(destinations, lengths, destination_bytes, "destination")
    some = lengths > 0
    return Runs(sources[some], destinations[some], lengths[some])


def require_inside(offset: NDArray[np.int64], length: NDArray[np.int64], size: int, what: str) -> None:
    """Raises TransferError unless 0 <= offset and offset + length <= size for every run, without overflow."""
    outside = (offset < 0) | (length < 0) | (length > size) | (offset > size - length)
    if outside.any():
        first = int(np.argmax(outside))
        raise TransferError(
            f"{int(outside.sum())} of {len(length)} runs are outside of the {what} region of {size} bytes; "
            f"the first is run {first}: offset {int(offset[first])}, length {int(length[first])}"
        )

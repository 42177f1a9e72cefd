"""Copies of bytes between two memories, as arrays."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Contiguous copies: `length[i]` bytes from `src_offset[i]` to `dst_offset[i]`.

    int64 arrays of shape [runs]; offsets are in bytes from the base of each side's memory. Raises ValueError when
    built of anything else.
    """

    src_offset: Ints
    dst_offset: Ints
    length: Ints

    def __post_init__(self) -> None:
        arrays = (self.src_offset, self.dst_offset, self.length)
        if any(a.dtype != np.int64 or a.ndim != 1 or len(a) != len(arrays[0]) for a in arrays):
            got = ", ".join(f"{a.dtype}{list(a.shape)}" for a in arrays)
            raise ValueError(f"runs are three int64 vectors of one length; got {got}")

    def __len__(self) -> int:
        return len(self.length)

    def __getitem__(self, index: slice | NDArray[Any]) -> "Runs":
        """Select runs by a slice, a mask or an array of positions."""
        return Runs(self.src_offset[index], self.dst_offset[index], self.length[index])

    @property
    def nbytes(self) -> int:
        """Bytes that all of them move together."""
        return int(self.length.sum())

    def at_most(self, limit: int) -> "Runs":
        """Return the same bytes in runs of at most `limit` bytes: longer runs are cut."""
        if not len(self) or int(self.length.max()) <= limit:
            return self
        parts = -(-self.length // limit)
        whole = self[np.repeat(np.arange(len(self)), parts)]
        skipped = (np.arange(len(whole)) - np.repeat(np.cumsum(parts) - parts, parts)) * limit
        return Runs(whole.src_offset + skipped, whole.dst_offset + skipped, np.minimum(whole.length - skipped, limit))

    def pieces(self, max_bytes: int, max_runs: int) -> Iterator["Runs"]:
        """Yield the same bytes in the same order, in pieces within both limits; runs longer than a piece are cut."""
        runs = self.at_most(max_bytes)
        ends = np.cumsum(runs.length)
        start = 0
        while start < len(runs):
            limit = ends[start] - runs.length[start] + max_bytes
            stop = min(int(np.searchsorted(ends, limit, side="right")), start + max_runs)
            yield runs[start:stop]
            start = stop

    def merged(self) -> "Runs":
        """Return the same bytes in the fewest runs, given that runs which adjoin in memory are neighbours here."""
        starts = np.ones(len(self), dtype=np.bool_)
        starts[1:] = ~_continues(self[:-1], self[1:])
        if starts.all():
            return self
        first = np.flatnonzero(starts)
        return Runs(self.src_offset[first], self.dst_offset[first], np.add.reduceat(self.length, first))

    def swapped(self) -> "Runs":
        """Return the same copies in the opposite direction."""
        return Runs(self.dst_offset, self.src_offset, self.length)

    def ascending(self) -> "Runs":
        """Return the same runs by ascending source offset."""
        if (self.src_offset[1:] > self.src_offset[:-1]).all():
            return self
        # Stable means timsort here: quick on what `repeated` returns, a few stretches that are sorted already.
        return self[np.argsort(self.src_offset, kind="stable")]


@dataclass(frozen=True, slots=True, eq=False)
class Offsets:
    """Byte offsets on both sides, ascending on the source; int64 arrays of one shape."""

    src: Ints
    dst: Ints


def repeated(runs: Runs, outer: Offsets, inner: Offsets) -> Runs:
    """Return every run at every sum of an outer and an inner offset, in the fewest runs.

    `runs` come merged and ascend on the source, whose blocks are not larger than the destination's; each lies
    within one block. Outer offsets lie further apart than all of the runs, inner offsets within one block. So the
    product, taken in this order, ascends too, except where a destination block boundary cuts a source block; and
    there the two sides of the cut do not adjoin on the destination.
    """
    product = Runs(
        _sums(outer.src, runs.src_offset, inner.src),
        _sums(outer.dst, runs.dst_offset, inner.dst),
        np.repeat(np.tile(runs.length, len(outer.src)), len(inner.src)),
    )
    return product.merged() if _any_adjoin(runs, outer, inner) else product


def combined(parts: Sequence[Runs]) -> Runs:
    """Return all runs of several sets, in the fewest runs."""
    if len(parts) == 1:
        return parts[0]
    whole = Runs(
        np.concatenate([p.src_offset for p in parts]),
        np.concatenate([p.dst_offset for p in parts]),
        np.concatenate([p.length for p in parts]),
    )
    return whole.ascending().merged()


def _any_adjoin(runs: Runs, outer: Offsets, inner: Offsets) -> bool:
    """Tell whether a run of the product of `repeated` continues the one before it.

    Steps from one inner offset to the next are the same for every run, those between runs the same at every outer
    offset; so it is enough to look at each once, not at the whole product.
    """
    inner_steps = np.diff(inner.src)
    last = Runs(runs.src_offset + inner.src[-1], runs.dst_offset + inner.dst[-1], runs.length)
    src_extent = last.src_offset[-1] + last.length[-1] - runs.src_offset[0]
    dst_extent = last.dst_offset[-1] + last.length[-1] - runs.dst_offset[0]
    return bool(
        np.isin(inner_steps[inner_steps == np.diff(inner.dst)], runs.length).any()
        or _continues(last[:-1], runs[1:]).any()
        or ((np.diff(outer.src) == src_extent) & (np.diff(outer.dst) == dst_extent)).any()
    )


def _continues(runs: Runs, following: Runs) -> NDArray[np.bool_]:
    """Tell, for each pair, whether the following run begins where the run ends, on both sides."""
    src_ends, dst_ends = runs.src_offset + runs.length, runs.dst_offset + runs.length
    result: NDArray[np.bool_] = (src_ends == following.src_offset) & (dst_ends == following.dst_offset)
    return result


def _sums(outer: Ints, middle: Ints, inner: Ints) -> Ints:
    total: Ints = np.add.outer(np.add.outer(outer, middle), inner).ravel()
    return total

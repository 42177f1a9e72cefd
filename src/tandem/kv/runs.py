"""Copies of bytes between two memories, as arrays."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Runs:
    """Contiguous copies; int64 arrays of shape [runs], in bytes from the base of each side's KV memory."""

    src_offset: Ints
    dst_offset: Ints
    length: Ints

    def __len__(self) -> int:
        return len(self.length)

    @property
    def nbytes(self) -> int:
        """Bytes that all of them move together."""
        return int(self.length.sum())

    def at_most(self, limit: int) -> "Runs":
        """The same bytes in runs of at most `limit` bytes."""
        if not len(self) or int(self.length.max()) <= limit:
            return self
        pieces = -(-self.length // limit)
        which = np.repeat(np.arange(len(self)), pieces)
        skipped = (np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * limit
        return Runs(
            self.src_offset[which] + skipped,
            self.dst_offset[which] + skipped,
            np.minimum(self.length[which] - skipped, limit),
        )

    def merged(self) -> "Runs":
        """The same bytes in the fewest runs, given that what adjoins in memory does so in the arrays."""
        head = np.empty(len(self), dtype=np.bool_)
        head[:1] = True
        src, dst = self.src_offset, self.dst_offset
        head[1:] = ~_continues((src[:-1], src[1:]), (dst[:-1], dst[1:]), self.length[:-1])
        if head.all():
            return self
        first = np.flatnonzero(head)
        return Runs(self.src_offset[first], self.dst_offset[first], np.add.reduceat(self.length, first))

    def reversed(self) -> "Runs":
        """The same copies the other way."""
        return Runs(self.dst_offset, self.src_offset, self.length)

    def where(self, chosen: NDArray[np.bool_]) -> "Runs":
        return Runs(self.src_offset[chosen], self.dst_offset[chosen], self.length[chosen])

    def ascending(self) -> "Runs":
        """The same runs by ascending source offset."""
        if (self.src_offset[1:] > self.src_offset[:-1]).all():
            return self
        # Stable means timsort here: quick on what `grid` returns, a few stretches that are sorted already.
        order = np.argsort(self.src_offset, kind="stable")
        return Runs(self.src_offset[order], self.dst_offset[order], self.length[order])


@dataclass(frozen=True, slots=True, eq=False)
class Offsets:
    """Places at which every segment repeats, ascending on the source; int64 arrays of one shape."""

    src: Ints
    dst: Ints


def grid(segments: Runs, outside: Offsets, inside: Offsets) -> Runs:
    """Every segment at every place, in the fewest runs.

    `segments` ascend on the source and lie within one block each, on a source whose blocks are not the larger
    ones. Places `outside` lie further apart than all of the segments, places `inside` within one block. So the
    product, taken in this order, ascends too, but where destination blocks cut one of the source. The runs on
    the two sides of a cut cannot adjoin on the destination, save at one place: `segments` come merged.
    """
    product = Runs(
        _sums(outside.src, segments.src_offset, inside.src),
        _sums(outside.dst, segments.dst_offset, inside.dst),
        np.repeat(np.tile(segments.length, len(outside.src)), len(inside.src)),
    )
    return product.merged() if _any_continues(segments, outside, inside) else product


def joined(parts: Sequence[Runs]) -> Runs:
    """All runs of several sets, in the fewest runs."""
    if len(parts) == 1:
        return parts[0]
    whole = Runs(
        np.concatenate([p.src_offset for p in parts]),
        np.concatenate([p.dst_offset for p in parts]),
        np.concatenate([p.length for p in parts]),
    )
    return whole.ascending().merged()


def _any_continues(segments: Runs, outside: Offsets, inside: Offsets) -> bool:
    """Whether a run of the product of `grid` continues the one before it.

    Steps from one inner place to the next are the same in every segment, those between segments the same at
    every outer place; so it is enough to look at each once, not at every run.
    """
    last = Runs(segments.src_offset + inside.src[-1], segments.dst_offset + inside.dst[-1], segments.length)
    between_segments = _continues(
        (last.src_offset[:-1], segments.src_offset[1:]),
        (last.dst_offset[:-1], segments.dst_offset[1:]),
        segments.length[:-1],
    )
    between_outer = _continues(
        (outside.src[:-1] + last.src_offset[-1], outside.src[1:] + segments.src_offset[0]),
        (outside.dst[:-1] + last.dst_offset[-1], outside.dst[1:] + segments.dst_offset[0]),
        segments.length[-1:],
    )
    steps = np.diff(inside.src)
    within = np.isin(steps[steps == np.diff(inside.dst)], segments.length)
    return bool(between_segments.any() or between_outer.any() or within.any())


def _continues(src: tuple[Ints, Ints], dst: tuple[Ints, Ints], length: Ints) -> NDArray[np.bool_]:
    """Where runs from the first offsets, of some length, end at the second on both sides."""
    result: NDArray[np.bool_] = (src[0] + length == src[1]) & (dst[0] + length == dst[1])
    return result


def _sums(outer: Ints, middle: Ints, inner: Ints) -> Ints:
    total: Ints = np.add.outer(np.add.outer(outer, middle), inner).ravel()
    return total

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
        np.logical_not(self._continued(), out=head[1:])
        if head.all():
            return self
        first = np.flatnonzero(head)
        return Runs(self.src_offset[first], self.dst_offset[first], np.add.reduceat(self.length, first))

    def _continued(self) -> NDArray[np.bool_]:
        src, dst, length = self.src_offset, self.dst_offset, self.length[:-1]
        result: NDArray[np.bool_] = (src[:-1] + length == src[1:]) & (dst[:-1] + length == dst[1:])
        return result

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
    """Every segment at every place, in the fewest runs, by ascending source offset.

    `segments` ascend on the source; the places `outside` lie further apart than all of the segments, those
    `inside` within one block. So the product, taken in this order, is sorted already unless two segments
    share a block.
    """
    product = Runs(
        _sums(outside.src, segments.src_offset, inside.src),
        _sums(outside.dst, segments.dst_offset, inside.dst),
        np.repeat(np.tile(segments.length, len(outside.src)), len(inside.src)),
    )
    return product if _settled(segments, outside, inside) else product.ascending().merged()


def joined(parts: Sequence[Runs]) -> Runs:
    """All runs of several sets, in the fewest runs, by ascending source offset."""
    if len(parts) == 1:
        return parts[0]
    whole = Runs(
        np.concatenate([p.src_offset for p in parts]),
        np.concatenate([p.dst_offset for p in parts]),
        np.concatenate([p.length for p in parts]),
    )
    return whole.ascending().merged()


def _settled(segments: Runs, outside: Offsets, inside: Offsets) -> bool:
    """Whether the product of `grid` ascends and none of its runs continues the one before.

    Steps from one inner place to the next are the same in every segment, those between segments the same at
    every outer place; so it is enough to look at each once.
    """
    last_src, last_dst = segments.src_offset + inside.src[-1], segments.dst_offset + inside.dst[-1]
    src = np.concatenate([last_src[:-1], outside.src[:-1] + last_src[-1]])
    dst = np.concatenate([last_dst[:-1], outside.dst[:-1] + last_dst[-1]])
    length = np.concatenate([segments.length[:-1], np.full(len(outside.src) - 1, segments.length[-1])])
    next_src = np.concatenate([segments.src_offset[1:], outside.src[1:] + segments.src_offset[0]])
    next_dst = np.concatenate([segments.dst_offset[1:], outside.dst[1:] + segments.dst_offset[0]])
    ascends = bool((src < next_src).all())
    continues = bool(((src + length == next_src) & (dst + length == next_dst)).any())
    steps = np.diff(inside.src)
    steps = steps[steps == np.diff(inside.dst)]
    return ascends and not continues and not np.isin(steps, segments.length).any()


def _sums(outer: Ints, middle: Ints, inner: Ints) -> Ints:
    total: Ints = np.add.outer(np.add.outer(outer, middle), inner).ravel()
    return total

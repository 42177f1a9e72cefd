"""The overlap of two ranks' KV memories: the layers and heads that both hold, with their strides on both sides.

The sides are called *fine* and *coarse* by the size of their blocks, whichever of them is the source: a boundary of
coarse blocks falls within a fine block only where neither block size divides the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tandem.kv.layout import Axis, KvLayout, Span
from tandem.kv.runs import Ints, Offsets, Runs, repeated


class StridedAxis(NamedTuple):
    """An axis of the overlap: its size, and the bytes from one index to the next on each side."""

    axis: Axis
    size: int
    fine: int
    coarse: int


@dataclass(frozen=True, slots=True)
class Side:
    """The overlap in one side's memory: the offset of its first layer and head, and two strides, in bytes."""

    base: int
    block: int
    token: int

    def offsets(self, block_ids: Ints, slots: Ints) -> Ints:
        return self.base + block_ids * self.block + slots * self.token


@dataclass(frozen=True, slots=True, eq=False)
class TokenRanges:
    """Ranges of tokens within one block on both sides, ascending in fine memory; int64 arrays of shape [ranges]."""

    fine_block: Ints
    fine_slot: Ints
    coarse_block: Ints
    coarse_slot: Ints
    num_tokens: Ints


class Coalesced(NamedTuple):
    """A range of tokens as strided copies of `length` bytes each, one for each index of the axes that are left."""

    length: int
    outer: tuple[StridedAxis, ...]
    inner: tuple[StridedAxis, ...]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Layers and heads that the destination reads from one source."""

    source: int
    """Its rank among the sources."""
    fine: Side
    coarse: Side
    outer: tuple[StridedAxis, ...]
    """The axes outside of the block axis in fine memory, outermost first."""
    inner: tuple[StridedAxis, ...]
    """The axes inside of it; each range of tokens has its own size of the token axis."""
    head_bytes: int
    """One head of one token, which is contiguous on both sides."""

    def coalesce(self, num_tokens: int) -> Coalesced:
        """Merge axes that are dense on both sides into one contiguous length, as far as that goes."""
        length = self.head_bytes
        axes = [s._replace(size=num_tokens) if s.axis is Axis.TOKEN else s for s in (*self.outer, *self.inner)]
        left = [s for s in axes if s.size > 1]
        while dense := next((s for s in left if s.fine == s.coarse == length), None):
            left.remove(dense)
            length *= dense.size
        outer = {s.axis for s in self.outer}
        return Coalesced(
            length, tuple(s for s in left if s.axis in outer), tuple(s for s in left if s.axis not in outer)
        )

    def runs(self, ranges: TokenRanges) -> list[Runs]:
        """Return the copies from fine to coarse, as one set for each way in which the ranges coalesce."""
        base = Runs(
            self.fine.offsets(ranges.fine_block, ranges.fine_slot),
            self.coarse.offsets(ranges.coarse_block, ranges.coarse_slot),
            np.empty_like(ranges.num_tokens),
        )
        sizes: dict[tuple[tuple[StridedAxis, ...], tuple[StridedAxis, ...]], list[int]] = {}
        for num_tokens in np.unique(ranges.num_tokens).tolist():
            length, outer, inner = self.coalesce(num_tokens)
            base.length[ranges.num_tokens == num_tokens] = length
            sizes.setdefault((outer, inner), []).append(num_tokens)
        return [
            repeated(base[np.isin(ranges.num_tokens, alike)].merged(), _offsets(outer), _offsets(inner))
            for (outer, inner), alike in sizes.items()
        ]


def overlap(source: int, fine: KvLayout, coarse: KvLayout, layers: Span, heads: Span) -> Overlap:
    """Return the overlap in these layers and heads, which both sides hold."""
    sizes = {Axis.LAYER: layers.size, Axis.HEAD: heads.size, Axis.KV: fine.size(Axis.KV), Axis.TOKEN: 0}
    order = [d.axis for d in fine.dimensions]
    axes = [StridedAxis(a, sizes.get(a, 0), fine.stride(a), coarse.stride(a)) for a in order]
    block = order.index(Axis.BLOCK)
    return Overlap(
        source=source,
        fine=_side(fine, layers.start, heads.start),
        coarse=_side(coarse, layers.start, heads.start),
        outer=tuple(axes[:block]),
        inner=tuple(s for s in axes[block + 1 :] if s.axis is not Axis.DIM),
        head_bytes=fine.head_dim * fine.itemsize,
    )


def _side(layout: KvLayout, layer: int, head: int) -> Side:
    layers = (layer - layout.layers.start) * layout.stride(Axis.LAYER)
    heads = (head - layout.heads.start) * layout.stride(Axis.HEAD)
    return Side(layers + heads, layout.stride(Axis.BLOCK), layout.stride(Axis.TOKEN))


def _offsets(axes: Sequence[StridedAxis]) -> Offsets:
    """Return the offset of every index of the axes, the last axis fastest."""
    fine = coarse = np.zeros(1, dtype=np.int64)
    for axis in axes:
        index = np.arange(axis.size, dtype=np.int64)
        fine = np.add.outer(fine, index * axis.fine).ravel()
        coarse = np.add.outer(coarse, index * axis.coarse).ravel()
    return Offsets(fine, coarse)

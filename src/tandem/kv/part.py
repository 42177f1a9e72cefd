"""The part of a transfer that one source gives: a box of layers, heads and tokens, with its strides on both
sides.

The two sides are called near and far where only the direction of the copy tells them apart: near is the side
with the smaller blocks, so that far blocks cut a near one only if neither block size divides the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tandem.kv.layout import Axis, KvLayout, Span
from tandem.kv.runs import Ints, Offsets, Runs, grid


class Stride(NamedTuple):
    """An axis of the box: its size, and the bytes from one index to the next on each side."""

    axis: Axis
    size: int
    near: int
    far: int


@dataclass(frozen=True, slots=True)
class Side:
    """Where the box lies on one side, in bytes."""

    base: int
    block: int
    token: int

    def offsets(self, block_ids: Ints, slots: Ints) -> Ints:
        return self.base + block_ids * self.block + slots * self.token


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Stretches of tokens within one block on both sides, by near memory; int64 arrays of one shape."""

    near_block: Ints
    near_slot: Ints
    far_block: Ints
    far_slot: Ints
    tokens: Ints


@dataclass(frozen=True, slots=True)
class Part:
    """Layers and heads that come from one source."""

    source: int
    near: Side
    far: Side
    outside: tuple[Stride, ...]
    """The axes that near memory has outside of its blocks, outermost first."""
    inside: tuple[Stride, ...]
    """Those within its blocks; each segment puts in its own size of the token axis."""
    unit: int
    """Bytes that are contiguous on every side: one head of one token."""

    def fold(self, tokens: int) -> "Fold":
        """What a segment of so many tokens is copied in."""
        length = self.unit
        axes = [s._replace(size=tokens) if s.axis is Axis.TOKEN else s for s in (*self.outside, *self.inside)]
        rest = [s for s in axes if s.size > 1]
        while inner := next((s for s in rest if s.near == s.far == length), None):
            rest.remove(inner)
            length *= inner.size
        outside = {s.axis for s in self.outside}
        return Fold(
            length,
            tuple(s for s in rest if s.axis in outside),
            tuple(s for s in rest if s.axis not in outside),
        )

    def runs(self, segments: Segments) -> list[Runs]:
        """The copies from near to far, as one set for each way in which segments fold."""
        base = Runs(
            self.near.offsets(segments.near_block, segments.near_slot),
            self.far.offsets(segments.far_block, segments.far_slot),
            np.empty_like(segments.tokens),
        )
        alike: dict[tuple[tuple[Stride, ...], tuple[Stride, ...]], list[int]] = {}
        for tokens in np.unique(segments.tokens).tolist():
            fold = self.fold(tokens)
            base.length[segments.tokens == tokens] = fold.length
            alike.setdefault((fold.outside, fold.inside), []).append(tokens)
        return [
            grid(base.where(np.isin(segments.tokens, tokens)).merged(), _places(outside), _places(inside))
            for (outside, inside), tokens in alike.items()
        ]


class Fold(NamedTuple):
    """How a segment is copied: in runs of `length` bytes, one for each index of the axes that are left."""

    length: int
    outside: tuple[Stride, ...]
    inside: tuple[Stride, ...]


def between(source: int, near: KvLayout, far: KvLayout, layers: Span, heads: Span) -> Part:
    """The part of `source` that both sides hold: these layers and heads."""
    sizes = {Axis.LAYER: layers.size, Axis.HEAD: heads.size, Axis.KV: near.size(Axis.KV), Axis.TOKEN: 0}
    order = [d.axis for d in near.dimensions]
    strides = [Stride(a, sizes.get(a, 0), near.stride(a), far.stride(a)) for a in order]
    block = order.index(Axis.BLOCK)
    return Part(
        source=source,
        near=_side(near, layers.start, heads.start),
        far=_side(far, layers.start, heads.start),
        outside=tuple(strides[:block]),
        inside=tuple(s for s in strides[block + 1 :] if s.axis is not Axis.DIM),
        unit=near.head_dim * near.itemsize,
    )


def _side(layout: KvLayout, layer: int, head: int) -> Side:
    layers = (layer - layout.layers.start) * layout.stride(Axis.LAYER)
    heads = (head - layout.heads.start) * layout.stride(Axis.HEAD)
    return Side(layers + heads, layout.stride(Axis.BLOCK), layout.stride(Axis.TOKEN))


def _places(strides: Sequence[Stride]) -> Offsets:
    near = far = np.zeros(1, dtype=np.int64)
    for stride in strides:
        index = np.arange(stride.size, dtype=np.int64)
        near = np.add.outer(near, index * stride.near).ravel()
        far = np.add.outer(far, index * stride.far).ravel()
    return Offsets(near, far)

"""The memory layout of one rank's keys and values, as data.

Nothing here knows tensors, sockets or an engine: a layout is the order, sizes and byte strides of six axes,
and the global index ranges of layers and KV heads that the rank holds. Layouts come from peers too, so one
that contradicts itself cannot be made: building it raises `LayoutError`, decoding it
`msgspec.ValidationError`.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

# Bounds on what a peer may claim; they keep every later product of a size and a stride within an int64.
MOST_BYTES = 1 << 50
MOST_INDEX = 1 << 20


class LayoutError(ValueError):
    """A layout contradicts itself, or two layouts do not fit each other."""

    def __init__(self, field: str, expected: object, got: object) -> None:
        super().__init__(field, expected, got)
        self.field = field
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"KV layout: {self.field}: expected {self.expected}, got {self.got}"


class Axis(StrEnum):
    BLOCK = "block"
    LAYER = "layer"
    KV = "kv"
    """Keys, then values; of size 1 for a latent (MLA), which is both."""
    HEAD = "head"
    TOKEN = "token"
    """The slot of a token within its block."""
    DIM = "dim"


BLOCK_MAJOR = (Axis.BLOCK, Axis.HEAD, Axis.LAYER, Axis.KV, Axis.TOKEN, Axis.DIM)
TOKEN_MAJOR = (Axis.BLOCK, Axis.LAYER, Axis.KV, Axis.TOKEN, Axis.HEAD, Axis.DIM)
LAYER_MAJOR = (Axis.LAYER, Axis.KV, Axis.BLOCK, Axis.TOKEN, Axis.HEAD, Axis.DIM)


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The indices `start <= i < stop`."""

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def indices(self) -> range:
        return range(self.start, self.stop)

    def overlap(self, other: "Span") -> "Span":
        """Return the indices that both hold; of size 0 if there are none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))

    def covers(self, other: "Span") -> bool:
        return self.start <= other.start and other.stop <= self.stop

    def __str__(self) -> str:
        return f"[{self.start}, {self.stop})"


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The layers and KV heads of a model that one rank holds."""

    num_layers: int
    num_kv_heads: int
    layers: Span
    heads: Span

    def __post_init__(self) -> None:
        _within("num_layers", self.num_layers, MOST_INDEX)
        _within("num_kv_heads", self.num_kv_heads, MOST_INDEX)
        _inside("layers", self.layers, self.num_layers)
        _inside("heads", self.heads, self.num_kv_heads)


class Dimension(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    axis: Axis
    size: int
    stride: int
    """Bytes from one index to the next."""


class KvLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The KV memory of one rank. Raises `LayoutError` when built of values that contradict each other."""

    dimensions: tuple[Dimension, ...]
    """The six axes, outermost first: `token` within `block`, `dim` last and dense."""
    itemsize: int
    """Bytes of one element."""
    shard: Shard

    def __post_init__(self) -> None:
        self.check()

    def size(self, axis: Axis) -> int:
        return self._dimension(axis).size

    def stride(self, axis: Axis) -> int:
        """Return the bytes from one index of the axis to the next."""
        return self._dimension(axis).stride

    @property
    def layers(self) -> Span:
        return self.shard.layers

    @property
    def heads(self) -> Span:
        return self.shard.heads

    @property
    def blocks(self) -> int:
        return self.size(Axis.BLOCK)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.size(Axis.TOKEN)

    @property
    def head_dim(self) -> int:
        return self.size(Axis.DIM)

    @property
    def nbytes(self) -> int:
        """Bytes from the first to the last that the layout can address, gaps included."""
        return sum((d.size - 1) * d.stride for d in self.dimensions) + self.itemsize

    def check(self) -> None:
        """Raise `LayoutError` unless the layout is consistent."""
        if self.itemsize not in (1, 2, 4, 8):
            raise LayoutError("itemsize", "1, 2, 4 or 8 bytes", self.itemsize)
        self._check_axes()
        self._check_strides()
        if self.nbytes > MOST_BYTES:
            raise LayoutError("size of the memory", f"at most {MOST_BYTES} bytes", f"{self.nbytes} bytes")

    def _check_axes(self) -> None:
        axes = [d.axis for d in self.dimensions]
        if sorted(axes) != sorted(Axis) or axes[-1] is not Axis.DIM:
            raise LayoutError("dimensions", "each of the six axes once, dim last", ", ".join(axes) or "none")
        if axes.index(Axis.BLOCK) > axes.index(Axis.TOKEN):
            raise LayoutError("dimensions", "token within block", ", ".join(axes))
        for dimension in self.dimensions:
            _within(f"size of {dimension.axis}", dimension.size, MOST_BYTES)
            _within(f"stride of {dimension.axis}", dimension.stride, MOST_BYTES)
        for axis, held in ((Axis.LAYER, self.layers.size), (Axis.HEAD, self.heads.size)):
            if self.size(axis) != held:
                raise LayoutError(f"size of {axis}", f"{held}, as many as the rank holds", self.size(axis))
        if self.size(Axis.KV) > 2:
            raise LayoutError("size of kv", "2 (keys and values) or 1 (a latent)", self.size(Axis.KV))

    def _check_strides(self) -> None:
        inner, inner_bytes = "the element", self.itemsize
        for dimension in reversed(self.dimensions):
            # The stride of an axis with one index is never used; frameworks put anything there.
            if dimension.size == 1:
                continue
            if dimension.stride < inner_bytes:
                wanted = f"at least {inner_bytes} bytes, the extent of {inner}"
                raise LayoutError(f"stride of {dimension.axis}", wanted, dimension.stride)
            inner, inner_bytes = dimension.axis, dimension.size * dimension.stride
        if self.stride(Axis.DIM) != self.itemsize:
            raise LayoutError("stride of dim", f"{self.itemsize}, the itemsize", self.stride(Axis.DIM))

    def _dimension(self, axis: Axis) -> Dimension:
        return next(d for d in self.dimensions if d.axis is axis)


def packed(
    order: Sequence[Axis],
    shard: Shard,
    *,
    blocks: int,
    block_size: int,
    head_dim: int,
    itemsize: int,
    kv: int = 2,
) -> KvLayout:
    """Return a layout of the axes in `order`, outermost first, without gaps."""
    sizes = {
        Axis.BLOCK: blocks,
        Axis.LAYER: shard.layers.size,
        Axis.KV: kv,
        Axis.HEAD: shard.heads.size,
        Axis.TOKEN: block_size,
        Axis.DIM: head_dim,
    }
    dimensions: list[Dimension] = []
    stride = itemsize
    for axis in reversed(order):
        dimensions.insert(0, Dimension(axis, sizes[axis], stride))
        stride *= sizes[axis]
    return KvLayout(tuple(dimensions), itemsize, shard)


def block_major(shard: Shard, *, blocks: int, block_size: int, head_dim: int, itemsize: int) -> KvLayout:
    """Return `kv[block][kv_head][layer][k/v][token][dim]`: one run per block and source to an engine of another TP."""
    return packed(BLOCK_MAJOR, shard, blocks=blocks, block_size=block_size, head_dim=head_dim, itemsize=itemsize)


def token_major(shard: Shard, *, blocks: int, block_size: int, head_dim: int, itemsize: int) -> KvLayout:
    """Return `kv[block][layer][k/v][token][kv_head][dim]`: NHD within a block."""
    return packed(TOKEN_MAJOR, shard, blocks=blocks, block_size=block_size, head_dim=head_dim, itemsize=itemsize)


def layer_major(shard: Shard, *, blocks: int, block_size: int, head_dim: int, itemsize: int) -> KvLayout:
    """Return `kv[layer][k/v][block][token][kv_head][dim]`, for kernels that want each layer by itself."""
    return packed(LAYER_MAJOR, shard, blocks=blocks, block_size=block_size, head_dim=head_dim, itemsize=itemsize)


def latent(
    shard: Shard,
    *,
    blocks: int,
    block_size: int,
    latent_dim: int,
    itemsize: int,
    order: Sequence[Axis] = BLOCK_MAJOR,
) -> KvLayout:
    """Return a layout for multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one head, both key and value."""
    if shard.num_kv_heads != 1:
        raise LayoutError("num_kv_heads", "1 for a latent", shard.num_kv_heads)
    return packed(order, shard, blocks=blocks, block_size=block_size, head_dim=latent_dim, itemsize=itemsize, kv=1)


def _within(field: str, value: int, most: int) -> None:
    if not 1 <= value <= most:
        raise LayoutError(field, f"1 to {most}", value)


def _inside(field: str, span: Span, total: int) -> None:
    if not 0 <= span.start < span.stop <= total:
        raise LayoutError(field, f"a range that is not empty within [0, {total})", span)

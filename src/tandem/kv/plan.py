"""Which bytes of which source ranks one destination rank has to read.

`plan` is made once for a pair of engines; `TransferPlan.runs` applies it to the blocks of a request. Both are
pure.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tandem.kv.layout import Axis, KvLayout, LayoutError, Span
from tandem.kv.part import Part, Segments, between
from tandem.kv.runs import Ints, Runs, joined

BlockIds = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class BlockSpace:
    """The blocks of one side: how many a rank has at least, and the tokens in each."""

    name: str
    blocks: int
    size: int

    def used(self, ids: BlockIds, first: int, start: int, stop: int) -> Ints:
        """The ids of the blocks that hold the tokens; `ids[0]` is block number `first` of the request."""
        begin, end = start // self.size, -(-stop // self.size)
        if not 0 <= first <= begin or end > first + len(ids):
            have = f"[{first}, {first + len(ids)})"
            raise LayoutError(f"{self.name} blocks", f"blocks [{begin}, {end}) of the request", have)
        used = np.asarray(ids[begin - first : end - first])
        if used.ndim != 1 or used.dtype.kind not in "iu":
            got = f"{used.ndim} dimensions of {used.dtype}"
            raise LayoutError(f"{self.name} blocks", "one dimension of integers", got)
        if used.min() < 0 or used.max() >= self.blocks:
            got = f"{used.min()} to {used.max()}"
            raise LayoutError(f"{self.name} blocks", f"ids from 0 to {self.blocks - 1}", got)
        return used.astype(np.int64)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What one destination rank reads; made by `plan`."""

    parts: tuple[Part, ...]
    src: BlockSpace
    dst: BlockSpace

    @property
    def sources(self) -> tuple[int, ...]:
        """The sources that the destination reads from."""
        return tuple(sorted({part.source for part in self.parts}))

    def runs(
        self,
        src_blocks: BlockIds,
        dst_blocks: BlockIds,
        start: int,
        stop: int,
        *,
        src_first: int = 0,
        dst_first: int = 0,
        whole_tail: bool = False,
        max_run_bytes: int | None = None,
    ) -> dict[int, Runs]:
        """The copies for the tokens `start <= t < stop` of a request, by source, each in the fewest runs.

        Token t lies in block `src_blocks[t // block_size - src_first]` of the sources, and so for the
        destination: the lists may leave out the blocks before `src_first` and `dst_first`.

        `whole_tail` copies the last block to its end if block sizes are equal and it is copied from its
        beginning: fewer runs, for bytes without meaning. It is for the read that fills the block last: of two
        reads in flight either may end last, so the tail of an earlier one could fall on the tokens of a later
        one.

        `max_run_bytes` cuts longer runs. Raises `LayoutError` if a block id is outside of the memory, a token
        has no block, or a destination block has two places.
        """
        if not 0 <= start <= stop:
            raise LayoutError("tokens", "0 <= start <= stop", f"[{start}, {stop})")
        if max_run_bytes is not None and max_run_bytes < 1:
            raise LayoutError("max_run_bytes", "at least 1", max_run_bytes)
        if start == stop:
            return {}
        src_ids = self.src.used(src_blocks, src_first, start, stop)
        dst_ids = self.dst.used(dst_blocks, dst_first, start, stop)
        if len(np.unique(dst_ids)) < len(dst_ids):
            raise LayoutError("destination blocks", "each in one place", "one in two")
        if whole_tail and self.src.size == self.dst.size:
            stop = _whole(start, stop, self.src.size)
        segments = self._segments(src_ids, dst_ids, start, stop)
        return {source: self._from(source, segments, max_run_bytes) for source in self.sources}

    def _segments(self, src_ids: Ints, dst_ids: Ints, start: int, stop: int) -> Segments:
        """The tokens, cut at the block boundaries of both sides."""
        first = _edges(start, stop, {self.src.size, self.dst.size})
        tokens = np.diff(first, append=stop)
        src = src_ids[first // self.src.size - start // self.src.size], first % self.src.size
        dst = dst_ids[first // self.dst.size - start // self.dst.size], first % self.dst.size
        near, far = (src, dst) if _source_is_near(self.src.size, self.dst.size) else (dst, src)
        order = np.lexsort((near[1], near[0]))
        return Segments(near[0][order], near[1][order], far[0][order], far[1][order], tokens[order])

    def _from(self, source: int, segments: Segments, max_run_bytes: int | None) -> Runs:
        runs = joined([r for part in self.parts if part.source == source for r in part.runs(segments)])
        if not _source_is_near(self.src.size, self.dst.size):
            runs = runs.reversed()
        return runs if max_run_bytes is None else runs.at_most(max_run_bytes)


def plan(sources: Sequence[KvLayout], destinations: Sequence[KvLayout], reader: int, *, turn: int = 0) -> TransferPlan:
    """What `destinations[reader]` reads from which of `sources`; on both sides, all ranks of one engine.

    Ranks that hold the same layers and heads take turns with the readers of them: no two of them have numbers
    of readers that differ by more than one. `turn` moves the first turn on, so that the first readers of
    several engines need not all meet at one replica. Fewer sources make the same plan, as long as it named
    them.

    Raises `LayoutError` if the two sides cannot hold the same values, or no source holds what the reader
    needs.
    """
    destination = destinations[reader]
    _check_sources(sources, destination)
    parts: list[Part] = []
    for layers, heads, readers, holders in _cells(sources, destinations):
        if reader in readers:
            chosen = _choose(layers, heads, readers.index(reader) + turn, holders)
            parts.append(_part(chosen, sources[chosen], destination, layers, heads))
    blocks = min(sources[part.source].blocks for part in parts)
    return TransferPlan(
        tuple(parts),
        BlockSpace("source", blocks, sources[0].block_size),
        BlockSpace("destination", destination.blocks, destination.block_size),
    )


def sources_of_all(
    sources: Sequence[KvLayout], destinations: Sequence[KvLayout], *, turn: int = 0
) -> list[tuple[int, ...]]:
    """`plan(sources, destinations, reader).sources` of every reader, in time linear in the ranks of both sides.

    Raises `LayoutError` as `plan` does for any of them.
    """
    _check_sources(sources, destinations[0])
    chosen: list[set[int]] = [set() for _ in destinations]
    for layers, heads, readers, holders in _cells(sources, destinations):
        for place, reader in enumerate(readers):
            chosen[reader].add(_choose(layers, heads, place + turn, holders))
    return [tuple(sorted(one)) for one in chosen]


def _cells(
    sources: Sequence[KvLayout], destinations: Sequence[KvLayout]
) -> Iterator[tuple[Span, Span, list[int], list[int]]]:
    """Layers and heads, cut where sources begin and end; which destinations need of them, which sources hold them."""
    shard = destinations[0].shard
    head_bands = _bands([s.heads for s in sources], shard.num_kv_heads)
    for layers in _bands([s.layers for s in sources], shard.num_layers):
        needing = [i for i, d in enumerate(destinations) if d.layers.overlap(layers).size]
        holding = [i for i, s in enumerate(sources) if s.layers.covers(layers)]
        for heads in head_bands:
            readers = [i for i in needing if destinations[i].heads.overlap(heads).size]
            holders = [i for i in holding if sources[i].heads.covers(heads)]
            yield layers, heads, readers, holders


def _choose(layers: Span, heads: Span, turn: int, holders: Sequence[int]) -> int:
    if not holders:
        raise LayoutError("sources", f"one that holds heads {heads} of layers {layers}", "none")
    return holders[turn % len(holders)]


def _check_sources(sources: Sequence[KvLayout], destination: KvLayout) -> None:
    for rank, source in enumerate(sources):
        _check_fit(f"source {rank}", source, destination)
        _check_same("block_size", f"source {rank}", source.block_size, sources[0].block_size)


def _bands(spans: Iterable[Span], total: int) -> list[Span]:
    cuts = {0, total}
    for span in spans:
        cuts |= {span.start, span.stop}
    return [Span(start, stop) for start, stop in pairwise(sorted(cuts))]


def _part(chosen: int, source: KvLayout, destination: KvLayout, layers: Span, heads: Span) -> Part:
    layers, heads = layers.overlap(destination.layers), heads.overlap(destination.heads)
    if _source_is_near(source.block_size, destination.block_size):
        return between(chosen, source, destination, layers, heads)
    return between(chosen, destination, source, layers, heads)


def _source_is_near(src_size: int, dst_size: int) -> bool:
    return src_size <= dst_size


def _check_fit(name: str, source: KvLayout, destination: KvLayout) -> None:
    _check_same("num_layers", name, source.shard.num_layers, destination.shard.num_layers)
    _check_same("num_kv_heads", name, source.shard.num_kv_heads, destination.shard.num_kv_heads)
    _check_same("size of kv", name, source.size(Axis.KV), destination.size(Axis.KV))
    _check_same("head_dim", name, source.head_dim, destination.head_dim)
    _check_same("itemsize", name, source.itemsize, destination.itemsize)


def _check_same(field: str, name: str, got: int, expected: int) -> None:
    if got != expected:
        raise LayoutError(f"{field} of {name}", expected, got)


def _whole(start: int, stop: int, size: int) -> int:
    """The end of the last block if the tokens reach back to its beginning, else `stop`."""
    return -(-stop // size) * size if start <= stop // size * size else stop


def _edges(start: int, stop: int, sizes: Iterable[int]) -> Ints:
    """`start`, and every block boundary of any of the sizes before `stop`."""
    boundaries = [np.arange((start // size + 1) * size, stop, size, dtype=np.int64) for size in sizes]
    return np.unique(np.concatenate([np.array([start], dtype=np.int64), *boundaries]))

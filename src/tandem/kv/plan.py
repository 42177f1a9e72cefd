"""The runs of bytes that one destination rank reads from the ranks of another engine.

`plan` is computed once for a pair of engines; `TransferPlan.runs` applies it to the blocks of a request. Both are
pure.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tandem.kv.layout import Axis, KvLayout, LayoutError, Span
from tandem.kv.overlap import Overlap, TokenRanges, overlap
from tandem.kv.runs import Ints, Runs, combined

BlockIds = Sequence[int] | NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class BlockSpace:
    """The blocks of one side: the number that every rank has at least, and the tokens in each."""

    name: str
    blocks: int
    size: int

    def used(self, ids: BlockIds, start: int, stop: int) -> Ints:
        """Return the ids of the blocks that hold tokens `start <= t < stop` of the request whose blocks are `ids`."""
        begin, end = start // self.size, -(-stop // self.size)
        if end > len(ids):
            have = f"[0, {len(ids)})"
            raise LayoutError(f"{self.name} blocks", f"blocks [{begin}, {end}) of the request", have)
        used = np.asarray(ids[begin:end])
        if used.ndim != 1 or used.dtype.kind not in "iu":
            got = f"{used.ndim} dimensions of {used.dtype}"
            raise LayoutError(f"{self.name} blocks", "one dimension of integers", got)
        if used.min() < 0 or used.max() >= self.blocks:
            got = f"{used.min()} to {used.max()}"
            raise LayoutError(f"{self.name} blocks", f"ids from 0 to {self.blocks - 1}", got)
        return used.astype(np.int64)


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """The reads of one destination rank; made by `plan`."""

    overlaps: tuple[Overlap, ...]
    src: BlockSpace
    dst: BlockSpace

    @property
    def sources(self) -> tuple[int, ...]:
        """The sources that the destination reads from."""
        return tuple(sorted({o.source for o in self.overlaps}))

    def runs(
        self, src_blocks: BlockIds, dst_blocks: BlockIds, start: int, stop: int, *, whole_tail: bool = False
    ) -> dict[int, Runs]:
        """Return the copies for the tokens `start <= t < stop` of a request, by source, each in the fewest runs.

        Token t lies in block `src_blocks[t // block_size]` of the sources, and so for the destination.

        `whole_tail` copies the last block to its end if block sizes are equal and it is copied from its
        beginning: fewer runs, for bytes without meaning. It is for the read that fills the block last: of two
        reads in flight either may end last, so the tail of an earlier one could fall on the tokens of a later
        one.

        Raises `LayoutError` if a block id is outside of the memory, a token has no block, or a destination block
        appears twice.
        """
        if not 0 <= start <= stop:
            raise LayoutError("tokens", "0 <= start <= stop", f"[{start}, {stop})")
        if start == stop:
            return {}
        src_ids = self.src.used(src_blocks, start, stop)
        dst_ids = self.dst.used(dst_blocks, start, stop)
        if len(np.unique(dst_ids)) < len(dst_ids):
            raise LayoutError("destination blocks", "each in one place", "one in two")
        if whole_tail and self.src.size == self.dst.size:
            stop = _whole_blocks(start, stop, self.src.size)
        ranges = self._token_ranges(src_ids, dst_ids, start, stop)
        return {source: self._runs_from(source, ranges) for source in self.sources}

    def _token_ranges(self, src_ids: Ints, dst_ids: Ints, start: int, stop: int) -> TokenRanges:
        """Cut the tokens at the block boundaries of both sides."""
        first = _range_starts(start, stop, {self.src.size, self.dst.size})
        num_tokens = np.diff(first, append=stop)
        src = src_ids[first // self.src.size - start // self.src.size], first % self.src.size
        dst = dst_ids[first // self.dst.size - start // self.dst.size], first % self.dst.size
        fine, coarse = (src, dst) if _source_is_fine(self.src.size, self.dst.size) else (dst, src)
        order = np.lexsort((fine[1], fine[0]))
        return TokenRanges(fine[0][order], fine[1][order], coarse[0][order], coarse[1][order], num_tokens[order])

    def _runs_from(self, source: int, ranges: TokenRanges) -> Runs:
        runs = combined([r for o in self.overlaps if o.source == source for r in o.runs(ranges)])
        return runs if _source_is_fine(self.src.size, self.dst.size) else runs.swapped()


def plan(sources: Sequence[KvLayout], destinations: Sequence[KvLayout], reader: int, *, turn: int = 0) -> TransferPlan:
    """Plan what `destinations[reader]` reads from which of `sources`; on both sides, all ranks of one engine.

    Ranks that hold the same layers and heads take turns with their readers: the numbers of readers of any two of
    them differ by at most one. `turn` moves the first turn on, so that the first readers of several engines need
    not all meet at one replica. The sources that a plan names make the same plan by themselves.

    Raises `LayoutError` if the two sides cannot hold the same values, or no source holds what the reader
    needs.
    """
    destination = destinations[reader]
    _check_sources(sources, destination)
    overlaps: list[Overlap] = []
    for cell in _cells(sources, destinations):
        if reader in cell.readers:
            chosen = cell.holder(cell.readers.index(reader) + turn)
            overlaps.append(_overlap(chosen, sources[chosen], destination, cell))
    return TransferPlan(
        tuple(overlaps),
        BlockSpace("source", min(sources[o.source].blocks for o in overlaps), sources[0].block_size),
        BlockSpace("destination", destination.blocks, destination.block_size),
    )


def sources_of_all(
    sources: Sequence[KvLayout], destinations: Sequence[KvLayout], *, turn: int = 0
) -> list[tuple[int, ...]]:
    """Return `plan(sources, destinations, reader).sources` of every reader, in time linear in the ranks of both sides.

    Raises `LayoutError` as `plan` does for any of them.
    """
    _check_sources(sources, destinations[0])
    chosen: list[set[int]] = [set() for _ in destinations]
    for cell in _cells(sources, destinations):
        for place, reader in enumerate(cell.readers):
            chosen[reader].add(cell.holder(place + turn))
    return [tuple(sorted(one)) for one in chosen]


class _Cell(NamedTuple):
    """Layers and heads that every source holds entirely or not at all, and the ranks concerned by their index."""

    layers: Span
    heads: Span
    readers: list[int]
    holders: list[int]

    def holder(self, turn: int) -> int:
        if not self.holders:
            raise LayoutError("sources", f"one that holds heads {self.heads} of layers {self.layers}", "none")
        return self.holders[turn % len(self.holders)]


def _cells(sources: Sequence[KvLayout], destinations: Sequence[KvLayout]) -> Iterator[_Cell]:
    """Cut all layers and heads where sources begin and end."""
    shard = destinations[0].shard
    head_spans = _cut_at(shard.num_kv_heads, [s.heads for s in sources])
    for layers in _cut_at(shard.num_layers, [s.layers for s in sources]):
        needing = [i for i, d in enumerate(destinations) if d.layers.overlap(layers).size]
        holding = [i for i, s in enumerate(sources) if s.layers.covers(layers)]
        for heads in head_spans:
            readers = [i for i in needing if destinations[i].heads.overlap(heads).size]
            holders = [i for i in holding if sources[i].heads.covers(heads)]
            yield _Cell(layers, heads, readers, holders)


def _cut_at(total: int, spans: Iterable[Span]) -> list[Span]:
    """Cut `[0, total)` at both ends of every span."""
    ends = {0, total} | {end for span in spans for end in (span.start, span.stop)}
    return [Span(start, stop) for start, stop in pairwise(sorted(ends))]


def _overlap(chosen: int, source: KvLayout, destination: KvLayout, cell: _Cell) -> Overlap:
    layers, heads = cell.layers.overlap(destination.layers), cell.heads.overlap(destination.heads)
    if _source_is_fine(source.block_size, destination.block_size):
        return overlap(chosen, source, destination, layers, heads)
    return overlap(chosen, destination, source, layers, heads)


def _source_is_fine(src_size: int, dst_size: int) -> bool:
    return src_size <= dst_size


def _check_sources(sources: Sequence[KvLayout], destination: KvLayout) -> None:
    """Raise LayoutError unless all sources can hold the destination's values, in blocks of one size."""
    expected = _value_sizes(destination)
    for rank, source in enumerate(sources):
        for name, got in _value_sizes(source).items():
            if got != expected[name]:
                raise LayoutError(f"{name} of source {rank}", expected[name], got)
        if source.block_size != sources[0].block_size:
            raise LayoutError(f"block_size of source {rank}", sources[0].block_size, source.block_size)


def _value_sizes(layout: KvLayout) -> dict[str, int]:
    return {
        "num_layers": layout.shard.num_layers,
        "num_kv_heads": layout.shard.num_kv_heads,
        "size of kv": layout.size(Axis.KV),
        "head_dim": layout.head_dim,
        "itemsize": layout.itemsize,
    }


def _whole_blocks(start: int, stop: int, size: int) -> int:
    """Return the end of the last block if the tokens reach back to its beginning, else `stop`."""
    return -(-stop // size) * size if start <= stop // size * size else stop


def _range_starts(start: int, stop: int, sizes: Iterable[int]) -> Ints:
    """Return `start` and every block boundary of any of the sizes before `stop`."""
    boundaries = [np.arange((start // size + 1) * size, stop, size, dtype=np.int64) for size in sizes]
    return np.unique(np.concatenate([np.array([start], dtype=np.int64), *boundaries]))

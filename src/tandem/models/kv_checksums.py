"""Checksums of keys and values as they are written, and again of what a read has brought.

The checksum of a token, head and layer is the sum, modulo 2^64, of its words (four bytes where they divide `head_dim`,
else two or one) times fixed odd numbers, plus numbers for its position, head and layer (multilinear hashing; Lemire and
Kaser, 2014). A change within one word, be it any number of bits, always changes it; any other goes unnoticed with a
chance of about 2^-32; and right bytes in a wrong place do not fit. It guards against faults, not against forgers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tandem.kv.checksums import Mismatch, checksum_layout
from tandem.kv.layout import Axis, KvLayout

_WORDS = {4: torch.int32, 2: torch.int16, 1: torch.int8}
_POSITION_SALT, _HEAD_SALT, _LAYER_SALT = 0x1F83D9ABFB41BD6B, 0x3C6EF372FE94F82B, 0x510E527FADE682D1
_BY_TOKEN = (Axis.TOKEN, Axis.HEAD, Axis.LAYER, Axis.KV)


@dataclass(frozen=True, slots=True)
class ChecksumSlots:
    """The places of a step's new tokens in the table, and what is added for them, on the rank's first layer.

    Attributes:
        index: int64 [N, heads].
        salt: int64 [N, heads].
    """

    index: Tensor
    salt: Tensor


class KvChecksums:
    """The checksum table of a rank's KV memory.

    Args:
        kv: the KV memory, of `layout.shape`.
        table: int64, one element for each of `checksum_layout(layout)`.
        offset: bytes from the beginning of the rank's registered memory to the table.
    """

    def __init__(self, kv: Tensor, layout: KvLayout, table: Tensor, offset: int) -> None:
        self.offset = offset
        self._layout = layout
        self._table = table.view(-1)
        described = checksum_layout(layout)
        self._block, self._head, self._layer = (
            described.stride(axis) // described.itemsize for axis in (Axis.BLOCK, Axis.HEAD, Axis.LAYER)
        )
        self._kv = kv
        self._axes = [dimension.axis for dimension in layout.dimensions]
        self._in_block: list[Axis] = [axis for axis in self._axes if axis is not Axis.BLOCK]
        row = layout.head_dim * layout.itemsize
        self._word = next(_WORDS[size] for size in (4, 2, 1) if row % size == 0)
        drawn = np.random.default_rng(20_260_801).integers(0, 2**63, (layout.size(Axis.KV), row // self._word.itemsize))
        self._factors = torch.from_numpy(2 * drawn + 1).to(kv.device)  # [kv, words]
        shape = [layout.size(axis) if axis is Axis.KV else 1 for axis in self._in_block[:-1]]
        self._block_factors = self._factors.view(*shape, -1)
        self._scratch = torch.empty(0, dtype=torch.int64, device=kv.device)
        self._heads = torch.arange(layout.heads.size, device=kv.device)

    def slots(self, blocks: Tensor, offsets: Tensor, positions: Tensor) -> ChecksumSlots:
        """Return the places of N tokens. All arguments int64 [N]; `offsets`: places within their blocks."""
        index = (blocks * self._block + offsets)[:, None] + self._heads * self._head
        return ChecksumSlots(index, self._salt(positions))

    def write(self, slots: ChecksumSlots, layer: int, new: Tensor) -> None:
        """Note the checksums of new keys and values.

        Args:
            layer: index among the layers that the rank holds.
            new: [N, KV * heads, head_dim], the keys of all heads first.
        """
        heads = self._heads.shape[0]
        words = new.contiguous().view(self._word).view(new.shape[0], -1, heads, self._factors.shape[1])
        sums = (words * self._factors[:, None]).sum(-1).sum(1)
        self._table[slots.index + layer * self._layer] = sums + slots.salt + _wrapped(layer * _LAYER_SALT)

    def mismatches(self, blocks: Sequence[int], start: int, stop: int) -> list[Mismatch]:
        """Return what of tokens [start, stop) of a request does not fit the table. `blocks`: its block table."""
        size = self._layout.block_size
        wrong: list[Mismatch] = []
        for place in range(start // size, -(-stop // size)):  # a block's words stay in the CPU's caches
            first = place * size
            wrong += self._mismatches(blocks[place], first, max(start - first, 0), min(stop - first, size))
        return wrong

    def _mismatches(self, block: int, position: int, start: int, stop: int) -> list[Mismatch]:
        """The same for places [start, stop) of one block, whose first token is at `position`."""
        # In the order of the memory, so that the long sums run over neighbours.
        words = self._kv.select(self._axes.index(Axis.BLOCK), block)
        words = words.narrow(self._in_block.index(Axis.TOKEN), start, stop - start).view(self._word)
        if self._scratch.shape != words.shape:  # kept: to map fresh memory takes longer than the sums
            self._scratch = torch.empty(words.shape, dtype=torch.int64, device=words.device)
        products = self._scratch.copy_(words).mul_(self._block_factors)
        sums = (
            products.sum(-1).permute([self._in_block.index(axis) for axis in _BY_TOKEN]).sum(-1)
        )  # [N, heads, layers]
        layers = torch.arange(self._layout.layers.size, device=sums.device)
        places = torch.arange(start, stop, device=sums.device)
        index = (block * self._block + places)[:, None] + self._heads * self._head
        sums += self._salt(position + places)[:, :, None] + layers * _LAYER_SALT
        differs = sums != self._table[index[:, :, None] + layers * self._layer]
        first_head, first_layer = self._layout.heads.start, self._layout.layers.start
        return [
            Mismatch(block, position + start + token, first_head + head, first_layer + layer)
            for token, head, layer in torch.nonzero(differs).tolist()
        ]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this rank's memory."""
        layout = self._layout
        elements = layout.heads.size * layout.layers.size * layout.size(Axis.KV) * layout.head_dim
        return elements * layout.itemsize

    def _salt(self, positions: Tensor) -> Tensor:
        """[N] -> [N, heads] for the rank's first layer, of the numbers that the model gives to heads and layers.

        Never that of zeros, which is what memory holds before anything is written.
        """
        heads = (self._heads + self._layout.heads.start) * _HEAD_SALT
        return positions[:, None] * _POSITION_SALT + heads + _wrapped(self._layout.layers.start * _LAYER_SALT + 1)


def _wrapped(value: int) -> int:
    """Return the value modulo 2^64 as an int64 holds it."""
    return (value + 2**63) % 2**64 - 2**63

"""Checksums of KV, as data: a table beside a rank's KV memory with one value for each token, head and layer of a block.

The table is described by a `KvLayout` itself, of one 8-byte element where the KV has keys and values. So what plans
the reads of KV plans those of its checksums too, for any pair of shapes and block sizes. A value belongs to one token,
which never changes once it is computed: a block that is still growing needs no care.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tandem.kv.layout import BLOCK_MAJOR, KvLayout, packed
from tandem.kv.runs import Runs

CHECKSUM_BYTES = 8


class Mismatch(NamedTuple):
    """A token of which one head in one layer does not fit its checksum. Heads and layers as the model numbers them."""

    block: int
    position: int
    head: int
    layer: int


def checksum_layout(kv: KvLayout) -> KvLayout:
    """Return the layout of the checksums of a rank's KV memory, whose table begins at `checksum_offset`."""
    return packed(
        BLOCK_MAJOR,
        kv.shard,
        blocks=kv.blocks,
        block_size=kv.block_size,
        head_dim=1,
        itemsize=CHECKSUM_BYTES,
        kv=1,
    )


def checksum_offset(kv: KvLayout) -> int:
    """Return where Tandem's own ranks put the table: the first place after the KV at which its elements are aligned."""
    return -(-kv.nbytes // CHECKSUM_BYTES) * CHECKSUM_BYTES


def with_checksums(kv: Runs, checksums: Runs, src_offset: int, dst_offset: int) -> Runs:
    """Return the copies of both; the tables begin at these offsets of the memories of either side."""
    moved = Runs(checksums.src_offset + src_offset, checksums.dst_offset + dst_offset, checksums.length)
    return Runs(*(np.concatenate(pair) for pair in zip(_arrays(kv), _arrays(moved), strict=True)))


def _arrays(runs: Runs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return runs.src_offset, runs.dst_offset, runs.length

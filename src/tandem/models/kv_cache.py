"""The paged KV cache of a rank: the layout of its memory, and the views through which attention reads and writes it."""

from __future__ import annotations

import torch
from torch import Tensor

from tandem.kv.layout import Axis, KvLayout, block_major
from tandem.models.kv_checksums import KvChecksums
from tandem.models.model_config import ModelConfig
from tandem.models.rank_position import RankPosition


def kv_layout(
    config: ModelConfig, position: RankPosition, num_blocks: int, block_size: int, dtype: torch.dtype
) -> KvLayout:
    """Return the layout of a rank's KV memory. Its order of axes is decided in `tandem.kv.layout` and nowhere else."""
    return block_major(
        position.kv_shard(config),
        blocks=num_blocks,
        block_size=block_size,
        head_dim=config.head_dim,
        itemsize=dtype.itemsize,
    )


class PagedKvCache:
    """KV memory as two tables whose rows have the same index for every layer, up to the layer's offset.

    A *slot* is the key or value of one token, KV head and layer: `head_dim` elements. A *head block* is the keys or
    values of one block, KV head and layer: `block_size` slots, which the layout must keep together.

    Attributes:
        slots: for each layer a view [slots from its first one on, head_dim].
        head_blocks: for each layer a view [head blocks from its first one on, block_size * head_dim].
        checksums: of what is written, for those who read it; None if nobody wants them.
    """

    def __init__(self, kv: Tensor, layout: KvLayout, checksums: KvChecksums | None = None) -> None:
        """Make the views of `kv`, contiguous and of `layout.shape`. Raises `ValueError` if they cannot be made."""
        if tuple(kv.shape) != layout.shape or kv.dtype.itemsize != layout.itemsize:
            raise ValueError(f"kv must be {layout.shape} of {layout.itemsize} bytes; got {tuple(kv.shape)} {kv.dtype}")
        if layout.dimensions[-2].axis is not Axis.TOKEN:
            raise ValueError("the tokens of a head block must lie together: attention gathers it as one row")
        self.kv = kv
        self.checksums = checksums
        self.layout = layout
        self.block_size = layout.block_size
        head_block_bytes = layout.block_size * layout.stride(Axis.TOKEN)
        block, head, layer, kind = (
            layout.stride(axis) // head_block_bytes for axis in (Axis.BLOCK, Axis.HEAD, Axis.LAYER, Axis.KV)
        )
        slots, head_blocks = kv.view(-1, layout.head_dim), kv.view(-1, layout.block_size * layout.head_dim)
        layers = range(layout.layers.size)
        self.slots = [slots[index * layer * layout.block_size :] for index in layers]
        self.head_blocks = [head_blocks[index * layer :] for index in layers]
        self._per_block = block
        keys = torch.arange(layout.heads.size, device=kv.device) * head
        self._offsets = torch.stack((keys, keys + kind))  # [2, heads]

    def head_block_index(self, blocks: Tensor) -> Tensor:
        """[rows, blocks of a row] -> their head blocks [2, rows, heads, blocks of a row], flat."""
        return (blocks[None, :, None, :] * self._per_block + self._offsets[:, None, :, None]).flatten()

    def slot_index(self, blocks: Tensor, offsets: Tensor) -> Tensor:
        """[N] and [N] -> the slots that take the keys and then the values of each token: [N, 2 * heads]."""
        head_blocks = blocks[:, None] * self._per_block + self._offsets.flatten()
        return head_blocks * self.block_size + offsets[:, None]

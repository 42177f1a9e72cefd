"""The arena: a worker's own KV blocks, in Tandem's block-major layout, between vLLM's cache and the network.

vLLM's blocks are never shown to another engine: their pages are the kernel's affair, and vLLM frees them without
asking. Finished tokens are exported into the arena, where leases and reads are Tandem's; what was read is imported
from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.kv.layout import KvLayout, Shard, block_major
from tandem.transfer.transports.base import Region
from tandem.vllm.pages import PageLayout, paired


class Arena:
    """Memory of one worker.

    Args:
        caches: vLLM's cache of each layer of this worker, in order: views [blocks, kv_heads, block_size, 2 * head_dim].
        shard: the layers and heads that it holds.
        pages: the order within them.
        max_bytes: of the memory; it becomes whole blocks.

    Raises:
        ConfigError: not one block fits.
    """

    def __init__(self, caches: Sequence[Tensor], shard: Shard, pages: PageLayout, max_bytes: int) -> None:
        _, heads, self.block_size, width = caches[0].shape
        self._head_dim = width // 2
        self._pages = pages
        # [blocks, heads, 2, block_size * head_dim]: a page of keys, then one of values
        self._caches = [cache.view(cache.shape[0], heads, 2, self.block_size * self._head_dim) for cache in caches]
        dtype = caches[0].dtype
        block_bytes = heads * len(caches) * 2 * self.block_size * self._head_dim * dtype.itemsize
        self.blocks = max_bytes // block_bytes
        if self.blocks < 2:
            raise ConfigError(
                f"arena_gib gives {max_bytes} bytes, and one block of {self.block_size} tokens takes {block_bytes};"
                " a larger arena_gib is needed"
            )
        self.layout: KvLayout = block_major(
            shard,
            blocks=self.blocks,
            block_size=self.block_size,
            head_dim=self._head_dim,
            itemsize=dtype.itemsize,
        )
        # [block, head, layer, k/v, token, dim]. Zeros: a tail that was never written must not be a NaN for attention.
        self.kv = torch.zeros(self.layout.shape, dtype=dtype)

    @property
    def region(self) -> Region:
        return Region(self.kv.data_ptr(), self.kv.nbytes)

    def export(self, vllm_blocks: Sequence[int], arena_blocks: Sequence[int]) -> None:
        """Copy whole blocks from vLLM's cache into the arena."""
        for pages, rows in self._paired(vllm_blocks, arena_blocks):
            rows.copy_(pages)

    def load(self, vllm_blocks: Sequence[int], arena_blocks: Sequence[int]) -> None:
        """Copy whole blocks from the arena into vLLM's cache."""
        for pages, rows in self._paired(vllm_blocks, arena_blocks):
            pages.copy_(rows)

    def _paired(self, vllm_blocks: Sequence[int], arena_blocks: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what belongs together, by layer, block and kind: one copy each, without a copy in between."""
        orders = (self._pages.keys, self._pages.values)
        for layer, cache in enumerate(self._caches):
            for theirs, ours in zip(vllm_blocks, arena_blocks, strict=True):
                for kind, order in enumerate(orders):
                    yield paired(cache[theirs, :, kind], self.kv[ours, :, layer, kind], order)

from __future__ import annotations

import pytest
import torch

from tandem.kv.layout import BLOCK_MAJOR, Axis, Shard, Span, block_major, packed, token_major
from tandem.models.kv_cache import PagedKvCache, kv_layout
from tandem.models.model_config import load_config
from tandem.models.rank_position import RankPosition
from tests.models.conftest import Folder

SHARD = Shard(num_layers=3, num_kv_heads=2, layers=Span(0, 3), heads=Span(0, 2))


def test_kv_memory_is_counted_per_rank(folder: Folder) -> None:
    config = load_config(folder("qwen3", layers=5))
    layout = kv_layout(config, RankPosition(0, 2, 0, 2), 7, 16, torch.float32)
    assert layout.shape == (7, 1, 3, 2, 16, 16)
    assert layout.nbytes == 7 * layout.stride(Axis.BLOCK) == 7 * 16 * 1 * 3 * 2 * 16 * 4


@pytest.mark.parametrize(
    "order", [BLOCK_MAJOR, (Axis.LAYER, Axis.BLOCK, Axis.KV, Axis.HEAD, Axis.TOKEN, Axis.DIM)], ids=["block", "layer"]
)
def test_slots_and_head_blocks_are_where_the_layout_says(order: tuple[Axis, ...]) -> None:
    layout = packed(order, SHARD, blocks=5, block_size=4, head_dim=16, itemsize=4)
    kv = torch.arange(layout.nbytes // 4, dtype=torch.float32).view(layout.shape)
    cache = PagedKvCache(kv, layout)
    axes = [dimension.axis for dimension in layout.dimensions]
    wanted = (Axis.KV, Axis.BLOCK, Axis.HEAD, Axis.LAYER, Axis.TOKEN, Axis.DIM)
    by_axis = kv.permute([axes.index(axis) for axis in wanted])
    blocks, offsets = torch.tensor([3, 0, 4]), torch.tensor([1, 2, 0])
    for layer in range(3):
        in_layer = by_axis[:, :, :, layer]  # [2, blocks, heads, block size, head_dim]
        slots = cache.slots[layer][cache.slot_index(blocks, offsets)].view(3, 2, 2, -1)  # [N, 2, heads, head_dim]
        assert torch.equal(slots, in_layer[:, blocks, :, offsets])
        gathered = cache.head_blocks[layer][cache.head_block_index(blocks[None])].view(2, 2, 3, 4, -1)
        assert torch.equal(gathered, in_layer[:, blocks].transpose(1, 2))


def test_memory_of_another_shape_or_item_size_is_refused() -> None:
    layout = block_major(SHARD, blocks=5, block_size=4, head_dim=16, itemsize=4)
    kv = torch.zeros(layout.shape)
    for other in (kv[:, :1].contiguous(), kv.half(), kv[0]):
        with pytest.raises(ValueError, match="kv must be"):
            PagedKvCache(other, layout)


def test_an_order_that_scatters_a_head_block_is_refused() -> None:
    layout = token_major(SHARD, blocks=5, block_size=4, head_dim=16, itemsize=4)
    with pytest.raises(ValueError, match="must lie together"):
        PagedKvCache(torch.zeros(layout.shape), layout)

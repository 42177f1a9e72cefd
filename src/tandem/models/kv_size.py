"""How much memory keys and values take."""

from __future__ import annotations

import torch

from tandem.models.model_config import ModelConfig
from tandem.models.parallel import RankPosition


def kv_shape(config: ModelConfig, shard: RankPosition, num_blocks: int, block_size: int) -> tuple[int, ...]:
    """The KV tensor of a rank: [blocks, KV heads held, layers held, 2, block size, head_dim]."""
    heads, layers = shard.kv_head_range(config.num_kv_heads), shard.layer_range(config.num_layers)
    return (num_blocks, len(heads), len(layers), 2, block_size, config.head_dim)


def kv_bytes_per_token(config: ModelConfig, shard: RankPosition, dtype: torch.dtype) -> int:
    """Bytes of one token on a rank."""
    _, heads, layers, kinds, _, head_dim = kv_shape(config, shard, 1, 1)
    return heads * layers * kinds * head_dim * dtype.itemsize


def kv_block_bytes(config: ModelConfig, shard: RankPosition, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block on a rank."""
    return kv_bytes_per_token(config, shard, dtype) * block_size

"""One rank's slice of a model: the index ranges of everything that is split, and of the checkpoint's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.models.collectives import Collectives
from tandem.models.model_config import ModelConfig
from tandem.models.rank_position import RankPosition, check_split


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """The part of a checkpoint's tensor that a rank needs, and the memory that takes it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor, by the model's configuration."""
    target: Tensor
    """Takes the part in its own dtype."""
    part: tuple[slice, ...] = ()
    """The part of the whole; () for all of it."""


class RankSlice:
    """The layers, heads and vocabulary of one rank. Raises `ModelError` if the model has too few for its ranks."""

    def __init__(
        self,
        config: ModelConfig,
        position: RankPosition,
        collectives: Collectives,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_split(config, position.tp_size, position.pp_size)
        self.config = config
        self.position = position
        self.collectives = collectives
        self.dtype = dtype
        self.device = device
        self.kv_shard = position.kv_shard(config)
        self.layers = self.kv_shard.layers.indices
        self.kv_heads = self.kv_shard.heads.indices
        self.query_heads = position.query_heads(config)
        self.intermediate = position.tp_slice(config.intermediate_size)
        # Equal on all ranks, so that logits can be gathered; the last ranks may hold rows that do not exist.
        self.vocab_rows = -(-config.vocab_size // position.tp_size)
        first = min(position.tp_rank * self.vocab_rows, config.vocab_size)
        self.vocab = range(first, min(first + self.vocab_rows, config.vocab_size))

    def tensor(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

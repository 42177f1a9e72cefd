"""What one rank computes of a model: the index ranges of everything that is split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tandem.models.layers import Linear
from tandem.models.model_config import ModelConfig
from tandem.models.parallel import Collectives, RankPosition


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """A tensor of the checkpoint, and where the part of it that a rank needs goes."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor, as the configuration has it."""
    target: Tensor
    """Takes the part in its own dtype."""
    part: tuple[slice, ...] = ()
    """What to read of the whole; () for all of it."""


class RankSlice:
    """One tensor-parallel rank of one pipeline stage. Raises `ModelError` when the model has too little to share."""

    def __init__(
        self,
        config: ModelConfig,
        shard: RankPosition,
        collectives: Collectives,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config = config
        self.shard = shard
        self.collectives = collectives
        self.dtype = dtype
        self.device = device
        self.layers = shard.layer_range(config.num_layers)
        self.kv_heads = shard.kv_head_range(config.num_kv_heads)
        self.query_heads = shard.query_head_range(config.num_heads, config.num_kv_heads)
        self.intermediate = shard.tp_slice(config.intermediate_size)
        # Equal on all ranks, so that logits can be gathered; the last ranks may hold rows that do not exist.
        self.vocab_rows = -(-config.vocab_size // shard.tp_size)
        first = min(shard.tp_rank * self.vocab_rows, config.vocab_size)
        self.vocab = range(first, min(first + self.vocab_rows, config.vocab_size))

    def tensor(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def linear(self, num_outputs: int, num_inputs: int, bias: bool = False) -> Linear:
        return Linear(num_outputs, num_inputs, bias, self.dtype, self.device)

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the tensor-parallel ranks; may be in place."""
        return partial if self.shard.tp_size == 1 else self.collectives.all_reduce(partial)

    def head_rows(self, heads: range) -> slice:
        """The rows of a projection that make these heads."""
        return slice(heads.start * self.config.head_dim, heads.stop * self.config.head_dim)

"""The position of a rank in an engine, and the layers and heads that follow from it.

`tandem.kv.shard` decides which layers and heads a rank holds, for the model and for the layout of its KV memory alike,
so that the two cannot disagree. What passes `check_split` it never refuses.
"""

from __future__ import annotations

from dataclasses import dataclass

from tandem.errors import ModelError
from tandem.kv.layout import Shard
from tandem.kv.shard import query_heads, shard
from tandem.models.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class RankPosition:
    """The position of one rank in an engine of `tp_size` x `pp_size` ranks."""

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    def kv_shard(self, config: ModelConfig) -> Shard:
        """Return the layers and KV heads that this rank holds."""
        return shard(
            config.num_layers,
            config.num_kv_heads,
            tp=self.tp_size,
            pp=self.pp_size,
            tp_rank=self.tp_rank,
            pp_rank=self.pp_rank,
        )

    def query_heads(self, config: ModelConfig) -> range:
        """Return the query heads that this rank computes: each attends to a KV head held here."""
        return query_heads(config.num_heads, config.num_kv_heads, tp=self.tp_size, tp_rank=self.tp_rank).indices

    def tp_slice(self, total: int) -> range:
        """Return this rank's share of `total` indices that can be split anywhere, as even as it can be."""
        each, more = divmod(total, self.tp_size)
        start = self.tp_rank * each + min(self.tp_rank, more)
        return range(start, start + each + (self.tp_rank < more))


def check_split(config: ModelConfig, tp: int, pp: int) -> None:
    """Raise `ModelError` if a rank would be left without a query head or a layer."""
    for flag, ranks, held, name in (
        ("tp", tp, config.num_heads, "attention heads"),
        ("pp", pp, config.num_layers, "layers"),
    ):
        if ranks > held:
            raise ModelError(
                f"the model has {held} {name}, which cannot be split over {flag} {ranks}; use at most {flag} {held}"
            )

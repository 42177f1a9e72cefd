"""Which part of a model one rank computes, and how the ranks of a tensor-parallel group talk.

Layers and heads are shared out by `tandem.kv.shard`, so that the model and the layout of its KV memory cannot
disagree.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from tandem.errors import ModelError, RankLost
from tandem.kv.layout import LayoutError
from tandem.kv.layout import Shard as KvShard
from tandem.kv.shard import query_heads, shard
from tandem.models.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class RankPosition:
    """The place of one rank in an engine of `tp_size` x `pp_size` ranks."""

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

    def kv_shard(self, num_layers: int, num_kv_heads: int) -> KvShard:
        """What of the KV cache this rank holds. Raises `ModelError`."""
        try:
            return shard(
                num_layers,
                num_kv_heads,
                tp=self.tp_size,
                pp=self.pp_size,
                tp_rank=self.tp_rank,
                pp_rank=self.pp_rank,
            )
        except LayoutError as error:
            raise _too_many_ranks(self, error) from error

    def layer_range(self, num_layers: int) -> range:
        """The layers that this rank computes. Raises `ModelError`."""
        return self.kv_shard(num_layers, 1).layers.indices

    def kv_head_range(self, num_kv_heads: int) -> range:
        """The KV heads that this rank holds. Raises `ModelError`."""
        return self.kv_shard(self.pp_size, num_kv_heads).heads.indices

    def query_head_range(self, num_heads: int, num_kv_heads: int) -> range:
        """The query heads that this rank computes: each attends to a KV head held here. Raises `ModelError`."""
        try:
            # Of all ranks, so that all refuse a split that leaves one of them without a head.
            spans = [
                query_heads(num_heads, num_kv_heads, tp=self.tp_size, tp_rank=rank) for rank in range(self.tp_size)
            ]
            return spans[self.tp_rank].indices
        except LayoutError as error:
            raise _too_many_ranks(self, error) from error

    def tp_slice(self, total: int) -> range:
        """This rank's share of `total` things that can be split anywhere, as even as it can be."""
        each, more = divmod(total, self.tp_size)
        start = self.tp_rank * each + min(self.tp_rank, more)
        return range(start, start + each + (self.tp_rank < more))


def check_split(config: ModelConfig, tp: int, pp: int) -> None:
    """Raises `ModelError` if a rank would be left without a query head or a layer."""
    if tp > config.num_heads:
        raise ModelError(
            f"the model has {config.num_heads} attention heads, which cannot be split over tp {tp};"
            f" use at most tp {config.num_heads}"
        )
    if pp > config.num_layers:
        raise ModelError(
            f"the model has {config.num_layers} layers, which cannot be split over pp {pp};"
            f" use at most pp {config.num_layers}"
        )


def _too_many_ranks(shard: RankPosition, error: LayoutError) -> ModelError:
    return ModelError(
        f"the model cannot be split over tp {shard.tp_size} x pp {shard.pp_size}: "
        f"{error.field}: expected {error.expected}, got {error.got}"
    )


@contextlib.contextmanager
def with_other_ranks() -> Iterator[None]:
    """Around what waits for other ranks. Raises `RankLost` when one of them has gone."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0][:200]
        raise RankLost(f"a rank of this engine was lost, or does not answer: {why}") from None


class Collectives(Protocol):
    """How the ranks of one tensor-parallel group combine tensors. All of them must make the same calls."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks; in place."""
        ...

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        """The tensors of all ranks, equal in shape, joined along `dim` in the order of the ranks."""
        ...

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        """As `all_gather`, but on rank 0 only; None on the others."""
        ...


class SoloCollectives:
    """A group of one."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        return tensor


class TorchCollectives:
    """Over a process group of `torch.distributed` that holds the ranks of one tensor-parallel group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._size = group.size()
        self._is_root = group.rank() == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        # The group's own methods: the wrappers of torch.distributed cost more than a small gloo message.
        with with_other_ranks():
            self._group.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(self._size)]
        with with_other_ranks():
            self._group.allgather([parts], [tensor.contiguous()]).wait()
        return torch.cat(parts, dim)

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        parts = [torch.empty_like(tensor) for _ in range(self._size)] if self._is_root else []
        options = dist.GatherOptions()
        options.rootRank = 0
        with with_other_ranks():
            self._group.gather([parts] if parts else [], [tensor.contiguous()], options).wait()
        return torch.cat(parts, dim) if parts else None

"""Collective operations between the ranks of one tensor-parallel group."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from tandem.errors import EngineFailed


@contextlib.contextmanager
def with_other_ranks() -> Iterator[None]:
    """Raise `EngineFailed` in place of torch's `RuntimeError` when a collective or message ends with a rank lost."""
    try:
        yield
    except RuntimeError as error:
        why = str(error).splitlines()[0][:200]
        raise EngineFailed(f"a rank of this engine was lost, or does not answer: {why}") from None


class Collectives(Protocol):
    """Combines the tensors of the ranks of one tensor-parallel group. All of them must make the same calls."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks; may be in place."""

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        """Return the tensors of all ranks, equal in shape, joined along `dim` by rank, on rank 0; None on others."""


class SoloCollectives:
    """A group of one."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
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

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        parts = [torch.empty_like(tensor) for _ in range(self._size)] if self._is_root else []
        options = dist.GatherOptions()
        options.rootRank = 0
        with with_other_ranks():
            self._group.gather([parts] if parts else [], [tensor.contiguous()], options).wait()
        return torch.cat(parts, dim) if parts else None

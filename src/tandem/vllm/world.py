"""The ranks of one vLLM engine as Tandem counts them: tensor parallelism within pipeline stages."""

from __future__ import annotations

from typing import Any

from torch import distributed as dist


class GroupWorld:
    """Gathers over vLLM's groups for control: first that of tensor parallelism, then that of the pipeline.

    Not over the world group: that may span the replicas of data parallelism, which are engines of their own.

    Args:
        tp: the group of the ranks of this pipeline stage, in order; None if this rank is alone.
        pp: the group of the ranks of this place in all stages; None if there is one stage.
    """

    def __init__(self, tp: dist.ProcessGroup | None, pp: dist.ProcessGroup | None) -> None:
        self._tp, self._pp = tp, pp
        self.tp_rank, self.tp_size = _place(tp)
        self.pp_rank, self.pp_size = _place(pp)

    @property
    def rank(self) -> int:
        return self.pp_rank * self.tp_size + self.tp_rank

    @property
    def size(self) -> int:
        return self.pp_size * self.tp_size

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks by rank."""
        stage: list[bytes] = _gather(self._tp, data)
        return [each for one in _gather(self._pp, stage) for each in one]


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _gather(group: dist.ProcessGroup | None, own: Any) -> list[Any]:
    if group is None:
        return [own]
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, own, group=group)
    return gathered

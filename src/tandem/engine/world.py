"""The ranks of an engine once they have met: process groups for control, tensor parallelism and the pipeline."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from tandem.config import ParallelSection
from tandem.engine.store import Store, subspace
from tandem.models.collectives import Collectives, SoloCollectives, TorchCollectives, with_other_ranks
from tandem.models.rank_position import RankPosition
from tandem.wire.addresses import interface_of

SMALL = 4096
"""Bytes per rank that a gather moves at once."""


class SoloWorld:
    """An engine of one rank."""

    rank = 0
    size = 1
    position = RankPosition()
    collectives: Collectives = SoloCollectives()

    def all_gather(self, data: bytes) -> list[bytes]:
        return [data]

    def send_to_next_stage(self, hidden: Tensor) -> None:
        raise AssertionError("a pipeline of one stage has no next one")

    def receive_from_last_stage(self, tokens: int, width: int, dtype: torch.dtype) -> Tensor | None:
        return None


class TorchWorld:
    """An engine of several ranks over torch.distributed: gloo on CPU, NCCL on CUDA.

    Args:
        store: in which the ranks have met.
        host: this node's address towards the others; its interface carries the traffic.
    """

    def __init__(
        self, store: Store, rank: int, parallel: ParallelSection, device: torch.device, host: str, timeout: float
    ) -> None:
        self.rank = rank
        self.size = parallel.world_size
        self.position = RankPosition(rank % parallel.tp, parallel.tp, rank // parallel.tp, parallel.pp)
        self._device = device
        self._sending: tuple[Any, Tensor] | None = None
        interface = interface_of(host)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            if interface is not None:
                os.environ.setdefault(variable, interface)
        wait = timedelta(seconds=timeout)
        dist.init_process_group("gloo", store=subspace(store, "world"), rank=rank, world_size=self.size, timeout=wait)
        backend = "nccl" if device.type == "cuda" else "gloo"
        groups = [
            dist.new_group(list(range(stage * parallel.tp, (stage + 1) * parallel.tp)), backend=backend, timeout=wait)
            for stage in range(parallel.pp)
        ]
        self._pipe = dist.new_group(backend=backend, timeout=wait) if backend == "nccl" else None
        self.collectives: Collectives = (
            TorchCollectives(groups[self.position.pp_rank]) if parallel.tp > 1 else SoloCollectives()
        )

    def all_gather(self, data: bytes) -> list[bytes]:
        """Return the data of all ranks by rank, with one collective if everybody's is small, else with a second one."""
        width = SMALL
        while True:
            own = torch.zeros(8 + width, dtype=torch.uint8)
            own[:8] = torch.frombuffer(bytearray(len(data).to_bytes(8, "little")), dtype=torch.uint8)
            head = bytearray(data[:width])
            if head:
                own[8 : 8 + len(head)] = torch.frombuffer(head, dtype=torch.uint8)
            parts = [torch.empty_like(own) for _ in range(self.size)]
            with with_other_ranks():
                dist.all_gather(parts, own)
            received = [bytes(part.numpy()) for part in parts]
            lengths = [int.from_bytes(part[:8], "little") for part in received]
            if max(lengths) <= width:
                return [part[8 : 8 + length] for part, length in zip(received, lengths, strict=True)]
            width = max(lengths)

    def send_to_next_stage(self, hidden: Tensor) -> None:
        """Send without waiting for the receiver, unless what was sent last is still under way."""
        with with_other_ranks():
            if self._sending is not None:
                self._sending[0].wait()
            self._sending = (dist.isend(hidden, self.rank + self.position.tp_size, group=self._pipe), hidden)

    def receive_from_last_stage(self, tokens: int, width: int, dtype: torch.dtype) -> Tensor | None:
        """Return the hidden states [tokens, width] of the stage before; None on the first stage."""
        if self.position.is_first_stage:
            return None
        hidden = torch.empty(tokens, width, dtype=dtype, device=self._device)
        with with_other_ranks():
            dist.recv(hidden, self.rank - self.position.tp_size, group=self._pipe)
        return hidden

    def close(self) -> None:
        dist.destroy_process_group()

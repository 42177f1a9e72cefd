"""One rank of an engine: its configuration, model and keys."""

from __future__ import annotations

import os
import socket as hosts

import torch
import zmq

from tandem import __version__, openmp
from tandem.checkpoint.fingerprint import fingerprint_in_background, sketch
from tandem.config import EngineConfig
from tandem.engine.start.placement import RankPlacement
from tandem.engine.step.runner import pick_device
from tandem.ids import new_identity
from tandem.models.model_config import ModelConfig, load_config
from tandem.models.rank_position import check_split
from tandem.transfer.handshake import PROTOCOL
from tandem.transfer.identity import RankRecord
from tandem.transfer.transports.registry import connector_name

_STARTS_THREADS = 1 << 17
"""Elements among which torch divides its work, which starts the OpenMP runtime."""


class Rank:
    """One rank before it meets the others: what it was configured with, and what it found in the model.

    Raises TandemError if that cannot work.

    Attributes:
        fingerprint: of the model, being computed; on the first rank of each node.
    """

    def __init__(self, config: EngineConfig, placement: RankPlacement) -> None:
        self.config = config
        self.placement = placement
        self.device = pick_device(config.model.device, placement.local_rank)
        _set_threads(config, self.device)
        self.model: ModelConfig = load_config(placement.model.path)
        check_split(self.model, config.parallel.tp, config.parallel.pp)
        self.dtype = self.model.torch_dtype(config.model.dtype)
        self.max_model_len = config.model.max_model_len or self.model.max_context
        self.model.check_max_model_len(self.max_model_len)
        self.connector = connector_name(config.network.connector)
        self.key = placement.key
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.model_files = sketch(placement.model.path)
        # Each node reads its own copy of the weights once, while its ranks meet and load.
        first_of_node = placement.local_rank == 0
        self.fingerprint = fingerprint_in_background(placement.model.path) if first_of_node else None

    def record(self) -> RankRecord:
        """Return what all ranks compare. Every call on rank 0 makes a new identity."""
        config, parallel, rank = self.config, self.config.parallel, self.placement.rank
        return RankRecord(
            rank=rank,
            tp_rank=rank % parallel.tp,
            pp_rank=rank // parallel.tp,
            node_rank=parallel.node_rank,
            host=hosts.gethostname() if parallel.nnodes == 1 else f"{hosts.gethostname()} {self.placement.host}",
            pid=os.getpid(),
            engine_id=config.engine_id,
            model=self.placement.model.name,
            model_files=self.model_files,
            dtype=str(self.dtype).removeprefix("torch."),
            device=self.device.type,
            tp=parallel.tp,
            pp=parallel.pp,
            nnodes=parallel.nnodes,
            block_size=config.cache.block_size,
            max_model_len=self.max_model_len,
            connector=self.connector,
            protocol=PROTOCOL,
            version=__version__,
            role=config.role,
            verify_kv=config.cache.verify_kv,
            cluster_key=self.key.fingerprint if self.key else "none",
            openmp=openmp.running(),
            threads=torch.get_num_threads(),
            identity=new_identity(config.engine_id) if rank == 0 else None,
        )


def _set_threads(config: EngineConfig, device: torch.device) -> None:
    """Share all cores of the node among the engine's ranks, unless told otherwise: engines seldom compute at once."""
    if device.type != "cpu":
        return
    ranks = len(config.parallel.local_ranks)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    torch.empty(_STARTS_THREADS).zero_()
    openmp.drop_registration()

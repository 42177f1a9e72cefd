"""Computes a batch on one rank: model, KV memory, sampler."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from tandem.engine.step.sampler import sample
from tandem.engine.world import SoloWorld, TorchWorld
from tandem.errors import ConfigError
from tandem.kv.layout import BLOCK_MAJOR, KvLayout, packed
from tandem.models.decoder import Decoder
from tandem.models.forward_batch import build_batch
from tandem.models.model_config import ModelConfig
from tandem.scheduling.batch import Batch, Sampled, StepResult
from tandem.transfer.transports.base import Region

CPU_KV_BYTES = 1 << 30
CUDA_KV_SHARE = 0.85


class KvMemory:
    """One allocation for all KV blocks of a rank: kv[block][kv_head][layer][k/v][token][dim].

    Zeroed: attention multiplies what lies beyond a sequence's end by zero, which must not be a NaN.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        if device.type == "cpu":
            elements = 1
            for size in shape:
                elements *= size
            # Anonymous pages: zero without being touched, so a large pool costs no time to start.
            self._pages = mmap.mmap(-1, elements * dtype.itemsize)
            self.tensor: Tensor = torch.frombuffer(self._pages, dtype=dtype).view(shape)
        else:
            self.tensor = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def region(self) -> Region:
        tensor = self.tensor
        device = -1 if tensor.device.type == "cpu" else (tensor.device.index or 0)
        return Region(tensor.data_ptr(), tensor.numel() * tensor.element_size(), device)


def kv_blocks(block_bytes: int, kv_memory: int | None, device: torch.device) -> int:
    """How many blocks this rank has room for. Raises ConfigError if not even one."""
    if kv_memory is None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kv_memory = int(free * CUDA_KV_SHARE)
    memory = CPU_KV_BYTES if kv_memory is None else kv_memory
    if memory < block_bytes:
        raise ConfigError(f"--kv-memory is {memory} bytes, but one block takes {block_bytes}; give it more")
    return memory // block_bytes


def kv_layout(decoder: Decoder, blocks: int, block_size: int) -> KvLayout:
    config = decoder.config
    return packed(
        BLOCK_MAJOR,
        decoder.shard.kv_shard(config.num_layers, config.num_kv_heads),
        blocks=blocks,
        block_size=block_size,
        head_dim=config.head_dim,
        itemsize=decoder.stage.dtype.itemsize,
    )


class Runner:
    """One rank's part of every batch.

    Args:
        kv: tensor [blocks, kv heads held, layers held, 2, block size, head_dim].
    """

    def __init__(self, decoder: Decoder, kv: Tensor, block_size: int, world: SoloWorld | TorchWorld) -> None:
        self._decoder = decoder
        self._kv = kv
        self._block_size = block_size
        self._world = world
        self._config: ModelConfig = decoder.config
        self.samples = world.position.is_last_stage and world.position.tp_rank == 0

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult | None:
        """Compute this rank's part; the result on the one rank that samples."""
        position = self._world.position
        rows = [(row.tokens, row.start, row.block_ids) for row in batch.rows]
        forward = build_batch(rows, self._kv.device, self._block_size)
        hidden = self._world.receive_from_last_stage(forward.num_tokens, self._config.hidden_size, self._kv.dtype)
        hidden = self._decoder.forward(forward, self._kv, hidden)
        if not position.is_last_stage:
            self._world.send_to_next_stage(hidden)
            return None
        return self._sample(batch, hidden, forward.last_tokens)

    def _sample(self, batch: Batch, hidden: Tensor, last_tokens: Tensor) -> StepResult | None:
        wanted = [index for index, row in enumerate(batch.rows) if row.sample is not None]
        sampled: list[Sampled | None] = [None] * len(batch.rows)
        if wanted:
            picked = last_tokens if len(wanted) == len(batch.rows) else last_tokens[wanted]
            logits = self._decoder.logits(hidden, picked)
            if logits is not None:
                places = [row.sample for row in batch.rows if row.sample is not None]
                for index, token in zip(wanted, sample(logits, places), strict=True):
                    sampled[index] = token
        elif self._kv.device.type == "cuda":
            torch.cuda.synchronize(self._kv.device)  # a chunk is announced for others to read: it must be written
        return StepResult(batch.batch_id, sampled) if self.samples else None


def pick_device(name: str, local_rank: int) -> torch.device:
    """The device of a rank. Raises ConfigError."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError("--device cuda, but torch finds no CUDA device here; use --device cpu or mend the driver")
    if name == "cpu" or not cuda:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"rank {local_rank} of this node has no GPU: there are {count}; start fewer ranks per node")
    return torch.device("cuda", local_rank)

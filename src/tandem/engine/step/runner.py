"""One rank's part of a step: the model on its KV memory, then the sampler."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping

import msgspec
import torch
from torch import Tensor

from tandem.engine.step.prompt_scorer import score_prompts
from tandem.engine.step.rank_requests import RankRequests
from tandem.engine.step.sampler import sample
from tandem.engine.step.step_message import Step, StepRow
from tandem.engine.world import SoloWorld, TorchWorld
from tandem.errors import ConfigError, EngineFailed, RequestError
from tandem.kv.checksums import checksum_layout, checksum_offset
from tandem.kv.layout import KvLayout
from tandem.models.decoder import Decoder
from tandem.models.forward_batch import ForwardRow, build_forward_batch, row_problem
from tandem.models.kv_cache import PagedKvCache
from tandem.models.kv_checksums import KvChecksums
from tandem.scheduling.batch import Mask, RowError, SampleAt, Sampled, StepResult, row_failed
from tandem.transfer.transports.base import Region
from tandem.wire.messages import TokenLogprobs

CPU_KV_BYTES = 1 << 30
CUDA_KV_SHARE = 0.85
NO_MASK = RowError(RequestError.code, "the mask of the tokens that the request's grammar allows did not come")

TakeMasks = Callable[[], Mapping[str, Mask]]


Computed = tuple[list[Sampled | None], dict[int, list[TokenLogprobs]]]
"""Of each row the token, where one is chosen; by row the log-probabilities of its prompt, where they are asked for."""


class KvMemory:
    """One allocation for all KV blocks of a rank, in `layout`, and behind them, if asked for, their checksums.

    Zeroed: attention multiplies what lies beyond a sequence's end by zero, which must not be a NaN.
    """

    def __init__(self, layout: KvLayout, dtype: torch.dtype, device: torch.device, *, verify: bool = False) -> None:
        self.layout = layout
        offset = checksum_offset(layout)
        size = offset + checksum_layout(layout).nbytes if verify else layout.nbytes
        if device.type == "cpu":
            # Anonymous memory: zero without being touched, so a large pool costs no time to start.
            self._memory = mmap.mmap(-1, size)
            self._bytes: Tensor = torch.frombuffer(self._memory, dtype=torch.uint8)
        else:
            self._bytes = torch.zeros(size, dtype=torch.uint8, device=device)
        self.tensor: Tensor = self._bytes[: layout.nbytes].view(dtype).view(layout.shape)
        table = self._bytes[offset:].view(torch.int64) if verify else None
        self.checksums = None if table is None else KvChecksums(self.tensor, layout, table, offset)

    @property
    def region(self) -> Region:
        device = -1 if self._bytes.device.type == "cpu" else (self._bytes.device.index or 0)
        return Region(self._bytes.data_ptr(), self._bytes.nbytes, device)


def kv_blocks(block_bytes: int, kv_memory: int | None, device: torch.device) -> int:
    """Return the number of blocks that this rank has room for. Raises ConfigError if not even one."""
    if kv_memory is None and device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        kv_memory = int(free * CUDA_KV_SHARE)
    memory = CPU_KV_BYTES if kv_memory is None else kv_memory
    if memory < block_bytes:
        raise ConfigError(f"--kv-memory is {memory} bytes, but one block takes {block_bytes}; give it more")
    return memory // block_bytes


class Runner:
    """Computes one rank's part of every step."""

    def __init__(self, decoder: Decoder, memory: KvMemory, world: SoloWorld | TorchWorld) -> None:
        self._decoder = decoder
        self._cache = PagedKvCache(memory.tensor, memory.layout, memory.checksums)
        self._dtype, self._device = memory.tensor.dtype, memory.tensor.device
        self._world = world
        self._samples = world.position.is_last_stage and world.position.tp_rank == 0
        self._requests = RankRequests(self._device, samples=self._samples)

    @torch.inference_mode()
    def run(self, step: Step, masks: TakeMasks = dict) -> StepResult | None:
        """Compute this rank's part; return the result on the one rank that samples.

        Args:
            masks: returns the masks of the constrained rows by request, for which it may wait; called once the model
                has run, on the rank that samples.

        A row that no batch can be made of fails alone: every rank finds the same ones, and computes the others.
        """
        self._requests.take(step)
        block_size = self._cache.block_size
        problems = [row_problem(self._forward_row(row), block_size) for row in step.rows]
        whole = [row for row, why in zip(step.rows, problems, strict=True) if why is None]
        computed = self._compute(whole, masks) if whole else ([], {})
        if computed is None or not self._samples:
            return None
        sampled, scores = computed
        chosen = iter(sampled)
        places = [index for index, why in enumerate(problems) if why is None]
        return StepResult(
            step.batch_id,
            [next(chosen) if why is None else row_failed(RequestError(why)) for why in problems],
            {places[index]: found for index, found in scores.items()},
        )

    def _forward_row(self, row: StepRow) -> ForwardRow:
        return ForwardRow(row.tokens, row.start, self._requests[row.request_id].table)

    def _compute(self, rows: list[StepRow], masks: TakeMasks) -> Computed | None:
        forward = build_forward_batch([self._forward_row(row) for row in rows], self._device, self._cache.block_size)
        width = self._decoder.config.hidden_size
        hidden = self._world.receive_from_last_stage(forward.num_tokens, width, self._dtype)
        hidden = self._decoder.forward(forward, self._cache, hidden)
        if not self._world.position.is_last_stage:
            self._world.send_to_next_stage(hidden)
            return None
        return self._sample(rows, hidden, forward.last_tokens, masks)

    def _sample(self, rows: list[StepRow], hidden: Tensor, last_tokens: Tensor, masks: TakeMasks) -> Computed:
        wanted = [index for index, row in enumerate(rows) if row.sample is not None]
        sampled: list[Sampled | None] = [None] * len(rows)
        if wanted:
            picked = last_tokens if len(wanted) == len(rows) else last_tokens[wanted]
            logits = self._decoder.logits(hidden, picked)
            if logits is not None:
                requested = _with_masks(rows, masks)
                counted = {
                    place: counts
                    for place, index in enumerate(wanted)
                    if rows[index].history is not None
                    and (counts := self._requests[rows[index].request_id].counts) is not None
                }
                for index, token in zip(wanted, sample(logits, requested, counted), strict=True):
                    sampled[index] = token
        elif self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a chunk is announced for others to read: it must be written
        scores = {}
        for index, found in score_prompts(self._decoder, rows, hidden, last_tokens).items():
            if found is None:
                sampled[index] = row_failed(EngineFailed("the model's logits of the prompt are not numbers"))
            else:
                scores[index] = found
        return sampled, scores


def _with_masks(rows: list[StepRow], take: TakeMasks) -> list[SampleAt]:
    """Return the sampling of the rows that have one, with their masks."""
    wanted = [(row.request_id, row.sample) for row in rows if row.sample is not None]
    if not any(at.constrained for _, at in wanted):
        return [at for _, at in wanted]
    masks = take()
    return [
        msgspec.structs.replace(at, mask=masks.get(request_id, NO_MASK)) if at.constrained else at
        for request_id, at in wanted
    ]


def pick_device(name: str, local_rank: int) -> torch.device:
    """Return the device of a rank. Raises ConfigError."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise ConfigError("--device cuda, but torch finds no CUDA device here; use --device cpu or mend the driver")
    if name == "cpu" or not cuda:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"rank {local_rank} of this node has no GPU: there are {count}; start fewer ranks per node")
    return torch.device("cuda", local_rank)

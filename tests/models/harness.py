"""Runs stages and ranks of a model in one process, with KV memory of their own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tandem.models.block_table import BlockTable
from tandem.models.collectives import Collectives, SoloCollectives
from tandem.models.decoder import Decoder
from tandem.models.forward_batch import ForwardBatch, ForwardRow, build_forward_batch
from tandem.models.kv_cache import PagedKvCache, kv_layout
from tandem.models.loader import load_decoder
from tandem.models.model_config import load_config
from tandem.models.rank_position import RankPosition

BLOCK_SIZE = 4
NUM_BLOCKS = 256

Rows = Sequence[tuple[list[int], int, list[int]]]
"""Tokens, start and block ids of each row."""


class ThreadGroup:
    """Collectives between the threads of one process."""

    def __init__(self, size: int) -> None:
        self.tensors: list[Tensor | None] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def rank(self, rank: int) -> ThreadCollectives:
        return ThreadCollectives(self, rank)


class ThreadCollectives:
    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self._group, self._rank = group, rank

    def all_reduce(self, tensor: Tensor) -> Tensor:
        total = torch.stack(self._exchange(tensor)).sum(0)
        return tensor.copy_(total)

    def gather(self, tensor: Tensor, dim: int) -> Tensor | None:
        parts = self._exchange(tensor)
        return torch.cat(parts, dim) if self._rank == 0 else None

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._group.tensors[self._rank] = tensor.clone()
        self._group.barrier.wait()
        parts = [part for part in self._group.tensors if part is not None]
        self._group.barrier.wait()
        return parts


class Engine:
    """All ranks of a model. Steps return the logits of rank 0 of the last stage, for all new tokens or the last."""

    def __init__(
        self,
        path: Path,
        tp: int = 1,
        pp: int = 1,
        dtype: torch.dtype = torch.float32,
        block_size: int = BLOCK_SIZE,
    ) -> None:
        self.block_size = block_size
        config = load_config(path)
        self.stages: list[list[tuple[Decoder, PagedKvCache]]] = []
        for pp_rank in range(pp):
            group = ThreadGroup(tp)
            self.stages.append([])
            for tp_rank in range(tp):
                position = RankPosition(tp_rank, tp, pp_rank, pp)
                collectives: Collectives = group.rank(tp_rank) if tp > 1 else SoloCollectives()
                decoder = load_decoder(path, position, collectives, dtype, "cpu")
                layout = kv_layout(config, position, NUM_BLOCKS, block_size, dtype)
                # What a block held before must never matter, be it NaN.
                kv = torch.full(layout.shape, float("nan"), dtype=dtype)
                self.stages[-1].append((decoder, PagedKvCache(kv, layout)))
        self.kv = [cache.kv for ranks in self.stages for _, cache in ranks]

    def step(self, rows: Rows, last_only: bool = True) -> Tensor:
        """float32 [R, vocab] of the last tokens in the order of `rows`, or [N, vocab] of all, one row only."""
        given = [ForwardRow(new, start, BlockTable(blocks)) for new, start, blocks in rows]
        batch = build_forward_batch(given, "cpu", self.block_size)
        tokens = batch.last_tokens if last_only else torch.arange(batch.num_tokens)
        hidden: Tensor | None = None
        for ranks in self.stages:
            logits_of = tokens if ranks is self.stages[-1] else None
            with ThreadPoolExecutor(len(ranks)) as pool:
                running = [pool.submit(_run, *rank, batch, hidden, logits_of) for rank in ranks]
            results = [one.result() for one in running]
            hidden = results[0][0]
        logits = results[0][1]
        assert logits is not None
        assert all(other is None for _, other in results[1:])
        return logits

    def logits(self, tokens: list[int], chunk: int | None = None, blocks: list[int] | None = None) -> Tensor:
        """float32 [len(tokens), vocab] of a prompt, computed in chunks."""
        blocks = blocks or shuffled_blocks(1)[0]
        chunk = chunk or len(tokens)
        starts = range(0, len(tokens), chunk)
        return torch.cat([self.step([(tokens[s : s + chunk], s, blocks)], last_only=False) for s in starts])

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        blocks = shuffled_blocks(1)[0]
        tokens = list(prompt)
        new, start = prompt, 0
        for _ in range(count):
            tokens.append(int(self.step([(new, start, blocks)])[0].argmax()))
            new, start = tokens[-1:], len(tokens) - 1
        return tokens[len(prompt) :]


def _run(
    decoder: Decoder, cache: PagedKvCache, batch: ForwardBatch, hidden: Tensor | None, logits_of: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    out = decoder.forward(batch, cache, hidden)
    return out, None if logits_of is None else decoder.logits(out, logits_of)


def shuffled_blocks(rows: int) -> list[list[int]]:
    """Disjoint lists of blocks in no order, for as many rows."""
    order: list[int] = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(rows)).tolist()
    return [order[row::rows] for row in range(rows)]


def random_tokens(count: int, vocab: int = 101, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens

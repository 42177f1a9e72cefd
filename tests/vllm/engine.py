"""An engine without vLLM: workers in threads with caches of their own, and a scheduler side that is stepped by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import tandem
from tandem.kv.shard import shard
from tandem.vllm.arena_blocks import ArenaBlocks
from tandem.vllm.messages import StepReport
from tandem.vllm.options import parse_options
from tandem.vllm.pages import PageLayout, to_pages, to_rows
from tandem.vllm.scheduler import NewRequest, Scheduled, SchedulerSide
from tandem.vllm.worker import ModelShape, Worker
from tandem.vllm.world import GroupWorld

LAYERS, KV_HEADS, DIM = 4, 2, 32
BLOCKS = 24
"""In vLLM's cache."""
WAIT_SECONDS = 30.0


class Meeting:
    """All-gathers among threads."""

    def __init__(self, size: int) -> None:
        self._barrier = threading.Barrier(size)
        self._data: list[bytes] = [b""] * size

    def all_gather(self, rank: int, data: bytes) -> list[bytes]:
        self._data[rank] = data
        self._barrier.wait(WAIT_SECONDS)
        gathered = list(self._data)
        self._barrier.wait(WAIT_SECONDS)
        return gathered


class ThreadWorld:
    """One rank's part in a meeting."""

    def __init__(self, meeting: Meeting, rank: int, tp: int, pp: int) -> None:
        self._meeting = meeting
        self.rank, self.size = rank, tp * pp
        self.tp_rank, self.tp_size, self.pp_rank, self.pp_size = rank % tp, tp, rank // tp, pp

    def all_gather(self, data: bytes) -> list[bytes]:
        return self._meeting.all_gather(self.rank, data)


def true_kv(tokens: Sequence[int]) -> Tensor:
    """Return the KV of a prompt [layers, 2, heads, tokens, dim]: it depends on the tokens so far, as a model's does."""
    values = [torch.randn(LAYERS, 2, KV_HEADS, DIM, generator=_seeded(tokens[: i + 1])) for i in range(len(tokens))]
    return torch.stack(values, dim=3)


def _seeded(tokens: Sequence[int]) -> torch.Generator:
    return torch.Generator().manual_seed(hash(tuple(tokens)) % (1 << 62))


class Rank:
    """A worker, and the cache that vLLM would have."""

    def __init__(
        self, world: ThreadWorld, model: ModelShape, pages: PageLayout, options: dict[str, Any], engine_id: str
    ) -> None:
        place = shard(
            LAYERS, KV_HEADS, tp=world.tp_size, pp=world.pp_size, tp_rank=world.tp_rank, pp_rank=world.pp_rank
        )
        self.layers, self.heads = place.layers, place.heads
        self._size, self._pages = model.block_size, pages
        self.caches = {
            f"model.layers.{layer}.self_attn.attn": torch.zeros(BLOCKS, self.heads.size, self._size, 2 * DIM)
            for layer in self.layers.indices
        }
        self.worker = Worker(parse_options(options), model, cast(GroupWorld, world), engine_id)
        self.worker.register(self.caches, pages)

    def compute(self, kv: Tensor, blocks: Sequence[int], start: int, stop: int) -> None:
        """Write tokens as the kernel would."""
        for token in range(start, stop):
            block, slot = blocks[token // self._size], token % self._size
            rows = self.read(block)
            rows[..., slot, :] = kv[self.layers.start : self.layers.stop, :, self.heads.start : self.heads.stop, token]
            for number, cache in enumerate(self.caches.values()):
                pages = cache.view(BLOCKS, self.heads.size, 2, self._size * DIM)
                for kind, order in enumerate((self._pages.keys, self._pages.values)):
                    pages[block, :, kind] = to_pages(rows[number, kind], order)

    def read(self, block: int) -> Tensor:
        """Return a block's rows [layers, 2, heads, tokens, dim]."""
        kinds = []
        for cache in self.caches.values():
            pages = cache.view(BLOCKS, self.heads.size, 2, self._size * DIM)
            orders = (self._pages.keys, self._pages.values)
            kinds.append(
                torch.stack([to_rows(pages[block, :, k], order, self._size, DIM) for k, order in enumerate(orders)])
            )
        return torch.stack(kinds)

    def holds(self, kv: Tensor, blocks: Sequence[int], start: int, stop: int) -> bool:
        """Return whether the cache has these tokens' KV."""
        rows = torch.cat([self.read(block) for block in blocks], dim=3)
        wanted = kv[self.layers.start : self.layers.stop, :, self.heads.start : self.heads.stop]
        return torch.equal(rows[..., start:stop, :], wanted[..., start:stop, :])


class Engine:
    """All of it. `received` and `failed`: requests that vLLM would have heard of."""

    def __init__(
        self,
        pages: PageLayout,
        *,
        tp: int = 1,
        pp: int = 1,
        block_size: int = 32,
        arena_blocks: int = 16,
        producer: bool = True,
        consumer: bool = True,
        recompute: bool = True,
        engine_id: str = "e",
        **options: Any,
    ) -> None:
        folder = str(Path(tandem.__file__).parent / "demo_model")
        self.model = ModelShape(folder, "m", "float32", LAYERS, KV_HEADS, block_size, 4096)
        heads, layers = max(1, KV_HEADS // tp), -(-LAYERS // pp)
        block_bytes = heads * layers * 2 * block_size * DIM * 4
        options = {"connector": "tcp", "arena_gib": (arena_blocks + 0.5) * block_bytes / (1 << 30), **options}
        meeting = Meeting(tp * pp)
        with ThreadPoolExecutor(tp * pp) as pool:
            made = [
                pool.submit(Rank, ThreadWorld(meeting, rank, tp, pp), self.model, pages, options, engine_id)
                for rank in range(tp * pp)
            ]
            self.ranks = [each.result() for each in made]
        self.side = SchedulerSide(
            parse_options(options), self.model, producer=producer, consumer=consumer, recompute=recompute
        )
        self.side.start([rank.worker.handshake for rank in self.ranks])
        self.received: set[str] = set()
        self.failed: set[str] = set()

    def transfer(self, transfer_id: str) -> dict[str, Any]:
        """Return the parameters with which a decode engine claims a transfer of this engine before it is prefilled."""
        return {
            "do_remote_prefill": True,
            "transfer_id": transfer_id,
            "remote_engine_id": "e",
            "remote_host": "127.0.0.1",
            "remote_port": self.port,
        }

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.side.stop()

    @property
    def port(self) -> int:
        leader = self.side._leader
        assert leader is not None
        return leader.address.port

    @property
    def arena(self) -> ArenaBlocks:
        arena = self.side._arena
        assert arena is not None
        return arena

    def step(self, scheduled: Sequence[Scheduled] = (), forward: Callable[[], None] = lambda: None) -> None:
        """Run a step of the engine: what is scheduled is computed by `forward`."""
        orders = self.side.build_orders(scheduled)
        forward()
        reports: list[StepReport] = []
        for rank in self.ranks:
            rank.worker.load(orders)
            rank.worker.save(orders)
            results = rank.worker.take_results()
            self.received |= results.received
            self.failed |= results.failed
            reports.append(rank.worker.report(orders))
        report = reports[0]
        for other in reports[1:]:
            report = report.aggregate(other)
        self.side.step_done(report)

    def prefill(
        self, request_id: str, tokens: Sequence[int], blocks: Sequence[int], chunk: int
    ) -> dict[str, Any] | None:
        """Compute a prompt in chunks and finish. Returns the parameters for the decode side."""
        kv = true_kv(tokens)
        self.side.on_new_request(NewRequest(request_id, tokens, {"do_remote_decode": True}))
        for start in range(0, len(tokens), chunk):
            stop = min(start + chunk, len(tokens))

            def forward(start: int = start, stop: int = stop) -> None:
                for rank in self.ranks:
                    rank.compute(kv, blocks, start, stop)

            self.step([Scheduled(request_id, stop, blocks)], forward)
        return self.side.finished(request_id, aborted=False)

    def claim(
        self, request_id: str, tokens: Sequence[int], params: dict[str, Any], blocks: Sequence[int], cached: int = 0
    ) -> int:
        """A request comes to the decode side and gets blocks. Returns how many tokens are to be loaded."""
        self.side.on_new_request(NewRequest(request_id, tokens, params))
        wanted = self.side.matched_tokens(request_id, cached)
        if wanted:
            self.side.allocated(request_id, blocks, wanted)
        return wanted

    def claim_fails(
        self, request_id: str, tokens: Sequence[int], params: dict[str, Any], blocks: Sequence[int]
    ) -> None:
        """A request comes whose KV does not, as is known before it gets blocks or later; then vLLM computes it."""
        if self.claim(request_id, tokens, params, blocks):
            self.wait_for(lambda: request_id in self.received)
            assert request_id in self.failed
        assert self.side.matched_tokens(request_id, 0) == 0

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Run empty steps until then."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not come to be in time"
            self.step()
            time.sleep(0.005)

    def wait_idle(self) -> None:
        """Run steps until every arena block is free again."""
        self.wait_for(lambda: self.side.idle)
        self.step()
        assert self.arena.available == self.arena._pool.num_blocks
        self.arena._pool.check()

    def holds(self, tokens: Sequence[int], blocks: Sequence[int], start: int = 0) -> bool:
        kv = true_kv(tokens)
        return all(rank.holds(kv, blocks, start, len(tokens)) for rank in self.ranks)

"""Bits that flip in a prefill engine's memory or on the way are noticed, and the answers are the right ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripts.make_random_model import RandomModel, write_random_model

from tandem.config import EngineConfig
from tandem.engine.start.launch import rank_main
from tandem.engine.start.placement import RankPlacement
from tandem.kv.runs import Runs
from tandem.reports import Reporter
from tests.support.fleet import Fleet, Shape
from tests.support.reference import greedy

SHAPES = [Shape(1), Shape(2), Shape(1, 2), Shape(1, 1, 24)]
PAIRS = [("tp1", "tp2"), ("tp2", "tp1"), ("tp1", "pp2"), ("pp2", "tp1-block24"), ("tp1-block24", "tp2"), ("tp2", "pp2")]
OUTPUT = 6


def prompt(seed: int, length: int) -> list[int]:
    return [random.Random(seed).randrange(3, 250) for _ in range(length)]


def in_flight(report: Reporter, config: EngineConfig, placement: RankPlacement) -> None:
    """Run a rank to which, in every second read of each session, one bit comes that was not sent."""
    from tandem.transfer.transports.tcp.client import TcpRead

    fill, reads = TcpRead.fill, set[int]()

    def damaged(self: TcpRead, piece: int, data: Any, memory: Any) -> None:
        runs: Runs = self.fetching.get(piece) or Runs(*(np.empty(0, np.int64),) * 3)
        fill(self, piece, data, memory)
        if len(runs) and self.number % 2 and self.number not in reads:
            reads.add(self.number)
            memory[int(runs.dst_offset[0])] ^= 1 << random.Random(self.number).randrange(8)

    TcpRead.fill = damaged  # type: ignore[method-assign]
    rank_main(report, config, placement)


def in_memory(report: Reporter, config: EngineConfig, placement: RankPlacement) -> None:
    """Run a rank in whose memory a bit flips before every second fetch of what was announced."""
    from tandem.transfer.transports.tcp.server import Server

    answer, fetches = Server._bytes, [0]

    def damaged(self: Server, fetch: Any) -> Any:
        fetches[0] += 1
        if fetches[0] % 2:
            self._memory[int(fetch.runs()[0][0])] ^= 1 << random.Random(fetches[0]).randrange(8)
        return answer(self, fetch)

    Server._bytes = damaged  # type: ignore[method-assign]
    rank_main(report, config, placement)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = RandomModel(
        family="qwen3", hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocab=300,
        dtype="float32", seed=5,
    )  # fmt: skip
    return write_random_model(tmp_path_factory.mktemp("verified"), shape)


@pytest.fixture(params=[rank_main, in_flight, in_memory])
def fleet(model: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Fleet, Callable[..., None]]]:
    made = Fleet(model, SHAPES, "tcp", verify_kv=True, main=request.param)
    yield made, request.param
    made.close()


@pytest.mark.timeout(600)
def test_every_answer_is_right_and_what_came_damaged_was_computed_again(
    fleet: tuple[Fleet, Callable[..., None]], model: Path
) -> None:
    engines, main = fleet
    recomputed = 0
    for seed, (prefill, decode) in enumerate(2 * PAIRS):
        # Of memory, after the whole prompt was announced, which is one chunk: what the engine itself computes from
        # damaged KV, nobody can tell. Else three chunks; and a last block that is not full.
        tokens = prompt(seed, 60 if main is in_memory else 150)
        output, last = engines.answer(prefill, decode, tokens, OUTPUT)
        assert output == greedy(model, tokens, OUTPUT), (prefill, decode)
        details = last.details
        assert details is not None
        recomputed += details.recomputations
        assert details.disaggregated == (not details.recomputations), details.reason
        if details.recomputations:
            assert "checksums of its KV do not fit" in (details.reason or "")
    assert (recomputed > 0) == (main is not rank_main)

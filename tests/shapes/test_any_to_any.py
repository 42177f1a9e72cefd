"""Any engine hands its KV to any other: shapes, block sizes, replicated heads, over each connector."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripts.make_random_model import RandomModel, write_random_model

from tests.support.fleet import Fleet, Shape
from tests.support.reference import greedy

SIX_HEADS = [
    Shape(1),
    Shape(2),
    Shape(3),
    Shape(4),
    Shape(1, 2),
    Shape(1, 3),
    Shape(2, 2),
    Shape(1, 1, 32),
    Shape(1, 1, 24),
]
PAIRS = [
    ("tp1", "tp2"),
    ("tp2", "tp1"),
    ("tp2", "tp4"),
    ("tp4", "tp2"),
    ("tp3", "tp2"),
    ("tp2", "tp3"),
    ("tp4", "tp3"),
    ("pp2", "tp2"),
    ("tp2", "pp2"),
    ("tp2xpp2", "tp1"),
    ("tp1", "tp2xpp2"),
    ("pp3", "pp2"),
    ("pp2", "pp3"),
    ("pp3", "tp4"),
    ("tp1", "tp1-block32"),
    ("tp1-block32", "tp1"),
    ("tp1", "tp1-block24"),
    ("tp1-block24", "tp1-block32"),
    ("tp3", "tp1-block24"),
    ("tp1-block32", "tp2xpp2"),
]
TWO_HEADS = [Shape(2), Shape(4), Shape(4, 1, 8)]
REPLICATED = [("tp4", "tp4-block8"), ("tp2", "tp4"), ("tp4", "tp2"), ("tp4-block8", "tp4")]
OUTPUT = 8


def prompt(length: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + length).randrange(3, 250) for _ in range(length)]


@pytest.fixture(scope="module")
def six_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = RandomModel(
        family="qwen3", hidden=96, layers=5, heads=12, kv_heads=6, head_dim=16, intermediate=128, vocab=300,
        dtype="float32", seed=3,
    )  # fmt: skip
    return write_random_model(tmp_path_factory.mktemp("six-heads"), model)


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = RandomModel(
        family="qwen2", hidden=64, layers=3, heads=8, kv_heads=2, head_dim=16, intermediate=96, vocab=299,
        dtype="float32", seed=4,
    )  # fmt: skip
    return write_random_model(tmp_path_factory.mktemp("two-heads"), model)


@pytest.fixture(scope="module", params=["nixl", "tcp"])
def six_head_fleet(six_heads: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    fleet = Fleet(six_heads, SIX_HEADS, request.param)
    yield fleet
    fleet.close()


@pytest.fixture(scope="module", params=["nixl", "tcp"])
def two_head_fleet(two_heads: Path, request: pytest.FixtureRequest) -> Iterator[Fleet]:
    fleet = Fleet(two_heads, TWO_HEADS, request.param)
    yield fleet
    fleet.close()


def check(fleet: Fleet, model: Path, source: str, sink: str, length: int) -> None:
    tokens = prompt(length, PAIRS.index((source, sink)) if (source, sink) in PAIRS else 99)
    output, last = fleet.answer(source, sink, tokens, OUTPUT)
    assert output == greedy(model, tokens, OUTPUT)
    assert last.details is not None
    assert last.details.disaggregated, last.details.reason
    assert last.details.recomputations == 0
    assert last.details.bytes > 0


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("source", "sink"), PAIRS)
def test_tokens_are_those_of_transformers(six_head_fleet: Fleet, six_heads: Path, source: str, sink: str) -> None:
    check(six_head_fleet, six_heads, source, sink, 101)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("source", "sink"), REPLICATED)
def test_ranks_that_share_a_head_read_and_are_read(
    two_head_fleet: Fleet, two_heads: Path, source: str, sink: str
) -> None:
    check(two_head_fleet, two_heads, source, sink, 75)


def test_only_missing_blocks_are_read(six_head_fleet: Fleet, six_heads: Path) -> None:
    tokens = prompt(96, 77)
    _, first = six_head_fleet.answer("tp2", "tp3", tokens, OUTPUT)
    output, second = six_head_fleet.answer("tp2", "tp3", tokens + prompt(16, 78), OUTPUT)
    assert output == greedy(six_heads, tokens + prompt(16, 78), OUTPUT)
    assert first.details is not None
    assert second.details is not None
    assert second.details.prefix_tokens["tp3"] >= 96
    assert second.details.bytes < first.details.bytes


def test_every_rank_shows_the_one_identity(six_head_fleet: Fleet) -> None:
    status = six_head_fleet.status("tp2xpp2")
    assert [rank.rank for rank in status.ranks] == [0, 1, 2, 3]
    assert {(rank.engine_id, rank.incarnation) for rank in status.ranks} == {("tp2xpp2", status.incarnation)}
    assert [(rank.tp_rank, rank.pp_rank) for rank in status.ranks] == [(0, 0), (1, 0), (0, 1), (1, 1)]

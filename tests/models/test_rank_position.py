from __future__ import annotations

import msgspec
import pytest

from tandem.errors import ModelError
from tandem.models.model_config import ModelConfig, load_config
from tandem.models.rank_position import RankPosition, check_split
from tests.models.conftest import Folder


@pytest.fixture
def config(folder: Folder) -> ModelConfig:
    return load_config(folder("qwen3"))


def with_heads(config: ModelConfig, num_heads: int, num_kv_heads: int) -> ModelConfig:
    return msgspec.structs.replace(config, num_heads=num_heads, num_kv_heads=num_kv_heads)


def test_earlier_stages_and_ranks_take_one_more(config: ModelConfig) -> None:
    deep, wide = msgspec.structs.replace(config, num_layers=8), with_heads(config, 12, 6)
    ranks = [RankPosition(r, 4) for r in range(4)]
    assert [RankPosition(pp_rank=r, pp_size=3).kv_shard(deep).layers.size for r in range(3)] == [3, 3, 2]
    assert [rank.kv_shard(wide).heads.size for rank in ranks] == [2, 2, 1, 1]
    assert [len(rank.query_heads(wide)) for rank in ranks] == [4, 4, 2, 2]
    assert [len(RankPosition(r, 3).tp_slice(70)) for r in range(3)] == [24, 23, 23]


def test_ranks_beyond_the_kv_heads_hold_copies_and_share_the_query_heads(config: ModelConfig) -> None:
    config = with_heads(config, 6, 2)
    ranks = [RankPosition(r, 4) for r in range(4)]
    assert [rank.kv_shard(config).heads.indices for rank in ranks] == [
        range(0, 1),
        range(0, 1),
        range(1, 2),
        range(1, 2),
    ]
    assert [head for rank in ranks for head in rank.query_heads(config)] == list(range(6))


@pytest.mark.parametrize("position", [RankPosition(0, 5), RankPosition(4, 5)])
def test_more_ranks_than_query_heads_are_refused(config: ModelConfig, position: RankPosition) -> None:
    with pytest.raises(ModelError, match="tp 5"):
        position.query_heads(with_heads(config, 4, 2))


@pytest.mark.parametrize(
    ("tp", "pp", "message"),
    [(5, 1, "has 4 attention heads.* tp 5; use at most tp 4"), (1, 3, "has 2 layers.* pp 3; use at most pp 2")],
)
def test_a_split_that_leaves_a_rank_without_work_is_refused(
    config: ModelConfig, tp: int, pp: int, message: str
) -> None:
    check_split(config, 4, 2)
    with pytest.raises(ModelError, match=message):
        check_split(config, tp, pp)

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.errors import ModelError
from tandem.models.model_config import ModelConfig, parse_config
from tandem.models.rank_position import RankPosition, check_split

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.fixture
def config() -> ModelConfig:
    return parse_config(SMALL)


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


@given(num_kv_heads=st.integers(1, 6), group=st.integers(1, 6), num_layers=st.integers(1, 6), data=st.data())
def test_what_passes_the_check_leaves_every_rank_with_heads_and_layers(
    num_kv_heads: int, group: int, num_layers: int, data: st.DataObject
) -> None:
    config = with_heads(parse_config(SMALL), num_kv_heads * group, num_kv_heads)
    config = msgspec.structs.replace(config, num_layers=num_layers)
    tp, pp = data.draw(st.integers(1, config.num_heads)), data.draw(st.integers(1, num_layers))
    check_split(config, tp, pp)
    ranks = [RankPosition(tp_rank, tp, pp_rank, pp) for pp_rank in range(pp) for tp_rank in range(tp)]
    assert [head for rank in ranks[:tp] for head in rank.query_heads(config)] == list(range(config.num_heads))
    for rank in ranks:
        assert rank.query_heads(config)
        assert rank.kv_shard(config).layers.size


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

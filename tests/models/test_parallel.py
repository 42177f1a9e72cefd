from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from tandem.errors import ModelError
from tandem.models.kv_size import kv_block_bytes, kv_bytes_per_token, kv_shape
from tandem.models.model_config import load_config
from tandem.models.parallel import RankPosition, SoloCollectives, TorchCollectives


def test_earlier_stages_and_ranks_take_one_more():
    assert [len(RankPosition(pp_rank=r, pp_size=3).layer_range(8)) for r in range(3)] == [3, 3, 2]
    assert [len(RankPosition(r, 4).kv_head_range(6)) for r in range(4)] == [2, 2, 1, 1]
    assert [len(RankPosition(r, 4).query_head_range(12, 6)) for r in range(4)] == [4, 4, 2, 2]
    assert [len(RankPosition(r, 3).tp_slice(70)) for r in range(3)] == [24, 23, 23]


def test_ranks_beyond_the_kv_heads_hold_copies_and_share_the_query_heads():
    assert [RankPosition(r, 4).kv_head_range(2) for r in range(4)] == [
        range(0, 1),
        range(0, 1),
        range(1, 2),
        range(1, 2),
    ]
    assert [h for r in range(4) for h in RankPosition(r, 4).query_head_range(6, 2)] == list(range(6))


@pytest.mark.parametrize("shard", [RankPosition(0, 5), RankPosition(4, 5)])
def test_more_ranks_than_query_heads_are_refused(shard):
    with pytest.raises(ModelError, match="tp 5"):
        shard.query_head_range(4, 2)


def test_kv_memory_is_counted_per_rank(folder):
    config = load_config(folder("qwen3", layers=5))
    shard = RankPosition(0, 2, 0, 2)
    assert kv_shape(config, shard, 7, 16) == (7, 1, 3, 2, 16, 16)
    assert kv_bytes_per_token(config, shard, torch.bfloat16) == 1 * 3 * 2 * 16 * 2
    assert kv_block_bytes(config, shard, 16, torch.float32) == 16 * 1 * 3 * 2 * 16 * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_collectives_over_gloo_sum_and_join(dtype):
    store = dist.HashStore()

    def rank(index):
        group = TorchCollectives(dist.ProcessGroupGloo(store, index, 3, timedelta(seconds=60)))
        own = torch.full((2, 1), float(index + 1), dtype=dtype)
        summed = own.clone()
        assert group.all_reduce(summed) is summed
        return summed, group.all_gather(own, dim=1), group.gather(own, dim=-1)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(rank, range(3)))
    joined = torch.tensor([[1, 2, 3], [1, 2, 3]], dtype=dtype)
    for index, (summed, everywhere, at_root) in enumerate(results):
        assert torch.equal(summed, torch.full((2, 1), 6, dtype=dtype))
        assert torch.equal(everywhere, joined)
        assert torch.equal(at_root, joined) if index == 0 else at_root is None


def test_a_group_of_one_leaves_tensors_as_they_are():
    tensor, solo = torch.ones(2), SoloCollectives()
    assert solo.all_reduce(tensor) is solo.all_gather(tensor, 0) is solo.gather(tensor, 0) is tensor

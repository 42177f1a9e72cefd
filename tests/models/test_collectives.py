from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch import distributed as dist
from torch._C._distributed_c10d import HashStore

from tandem.models.collectives import SoloCollectives, TorchCollectives


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_collectives_over_gloo_sum_and_join(dtype: torch.dtype) -> None:
    store = HashStore()

    def rank(index: int) -> tuple[Tensor, Tensor | None]:
        gloo = dist.ProcessGroupGloo(store, index, 3, timedelta(seconds=60))
        group = TorchCollectives(gloo)  # type: ignore[arg-type]  # torch's stubs make it no ProcessGroup
        own = torch.full((2, 1), float(index + 1), dtype=dtype)
        summed = own.clone()
        assert group.all_reduce(summed) is summed
        return summed, group.gather(own, dim=-1)

    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(rank, range(3)))
    joined = torch.tensor([[1, 2, 3], [1, 2, 3]], dtype=dtype)
    for index, (summed, at_root) in enumerate(results):
        assert torch.equal(summed, torch.full((2, 1), 6, dtype=dtype))
        if index == 0:
            assert at_root is not None
            assert torch.equal(at_root, joined)
        else:
            assert at_root is None


def test_a_group_of_one_leaves_tensors_as_they_are() -> None:
    tensor, solo = torch.ones(2), SoloCollectives()
    assert solo.all_reduce(tensor) is solo.gather(tensor, 0) is tensor

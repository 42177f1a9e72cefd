"""T0: the pages of the kernel that is installed, on this machine."""

from __future__ import annotations

import pytest
import torch

from tandem.vllm.self_test import cpu_kernel, find_page_layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("block_size", [32, 64, 96, 128])
def test_the_kernels_layout_is_known(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    amx = torch.cpu._is_amx_tile_supported() and dtype is torch.bfloat16
    found = find_page_layout(cpu_kernel(dtype, block_size, head_dim, "auto"), 2, block_size, head_dim, dtype)
    assert found.name == ("amx" if amx else "vec")

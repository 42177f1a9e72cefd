from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem.errors import StartError
from tandem.vllm.pages import AMX, KNOWN_LAYOUTS, VEC, PageLayout, fits, to_pages, to_rows
from tandem.vllm.self_test import find_page_layout
from tests.vllm.reference import OFFSETS, write

SHAPES = ((32, 32), (32, 64), (64, 32), (96, 80), (128, 128))


@pytest.mark.parametrize("layout", KNOWN_LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(("block_size", "head_dim"), SHAPES)
def test_a_page_has_each_element_where_the_kernel_puts_it(layout: PageLayout, block_size: int, head_dim: int) -> None:
    for order, offset in zip((layout.keys, layout.values), OFFSETS[layout.name], strict=True):
        rows = torch.arange(block_size * head_dim).view(block_size, head_dim)
        page = to_pages(rows, order)
        for token in range(block_size):
            for dim in range(0, head_dim, 7):
                assert page[offset(token, dim, block_size, head_dim)] == rows[token, dim]
        assert torch.equal(to_rows(page, order, block_size, head_dim), rows)


@pytest.mark.parametrize("layout", KNOWN_LAYOUTS, ids=lambda layout: layout.name)
def test_leading_axes_stay_as_they_are(layout: PageLayout) -> None:
    rows = torch.randn(3, 2, 32, 64)
    for order in (layout.keys, layout.values):
        pages = to_pages(rows, order)
        assert torch.equal(pages[2, 1], to_pages(rows[2, 1], order))
        assert torch.equal(to_rows(pages, order, 32, 64), rows)


@pytest.mark.parametrize("name", OFFSETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_self_test_tells_the_layouts_apart(name: str, dtype: torch.dtype) -> None:
    assert find_page_layout(write(name), 2, 32, 32, dtype).name == name


def test_the_self_test_refuses_what_it_does_not_know() -> None:
    def plain(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        pages = cache.view(cache.shape[0], cache.shape[1], 2, -1)
        pages[:, :, 0] = keys.view(2, 32, 2, 32).transpose(1, 2).reshape(2, 2, -1)
        pages[:, :, 1] = values.view(2, 32, 2, 32).transpose(1, 2).reshape(2, 2, -1)

    with pytest.raises(StartError, match="not known"):
        find_page_layout(plain, 2, 32, 32, torch.float32)


def test_a_kernel_that_swaps_two_elements_is_found_out() -> None:
    def swapped(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        write("vec")(keys, values, cache, slots)
        last = cache.view(-1)[-2:]
        last.copy_(last.flip(0).clone())

    with pytest.raises(StartError):
        find_page_layout(swapped, 1, 32, 32, torch.float32)


def test_tiles_need_sizes_that_they_divide() -> None:
    assert fits(AMX, 32, 80)
    assert not fits(AMX, 24, 64)
    assert not fits(AMX, 32, 40)
    assert fits(VEC, 24, 40)

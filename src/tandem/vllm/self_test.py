"""Finds out, by asking vLLM's own kernel, in which order it keeps keys and values in a block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tandem.errors import StartError
from tandem.vllm.pages import KNOWN_LAYOUTS, PageLayout, fits, to_rows

Write = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Writes keys and values [tokens, kv_heads, head_dim] into a cache [blocks, kv_heads, block_size, 2 * head_dim], at
slots [tokens]: the kernel under test."""

_BLOCKS = 2


def find_page_layout(write: Write, heads: int, block_size: int, head_dim: int, dtype: torch.dtype) -> PageLayout:
    """Return the layout in which the kernel writes: known values are written, and read back in each known order.

    Raises:
        StartError: it is none of them.
    """
    tokens = _BLOCKS * block_size
    # In each dtype exact, and no two elements of a head alike but where the dtype has too few values.
    numbers = torch.arange(tokens * heads * head_dim).view(tokens, heads, head_dim)
    keys, values = (((numbers * step) % 251 - 125).to(dtype) for step in (1, 7))
    cache = torch.zeros(_BLOCKS, heads, block_size, 2 * head_dim, dtype=dtype)
    write(keys, values, cache, torch.arange(tokens))
    for layout in KNOWN_LAYOUTS:
        if fits(layout, block_size, head_dim) and _holds(cache, layout, keys, values):
            return layout
    raise StartError(
        f"vLLM's attention kernel keeps its KV in an order that is not known (blocks of {block_size} tokens, heads of"
        f" {head_dim}, {dtype}); known are {', '.join(layout.name for layout in KNOWN_LAYOUTS)}."
        " This version of vLLM, or this processor, is not supported."
    )


def _holds(cache: Tensor, layout: PageLayout, keys: Tensor, values: Tensor) -> bool:
    blocks, heads, block_size, width = cache.shape
    pages = cache.view(blocks, heads, 2, block_size * width // 2)
    for kind, (order, wanted) in enumerate(((layout.keys, keys), (layout.values, values))):
        rows = to_rows(pages[:, :, kind], order, block_size, width // 2)  # [blocks, heads, block_size, head_dim]
        if not torch.equal(rows.transpose(1, 2).reshape(wanted.shape), wanted):
            return False
    return True


def cpu_kernel(dtype: torch.dtype, block_size: int, head_dim: int, cache_dtype: str) -> Write:
    """Return the kernel with which vLLM's CPU backend writes a cache of this kind."""
    from vllm import _custom_ops as ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    isa = _get_attn_isa(dtype, block_size, head_dim, cache_dtype)

    def write(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        blocks, heads, size, _ = cache.shape
        key_cache, value_cache = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)

    return write

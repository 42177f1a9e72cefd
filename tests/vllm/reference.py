"""The pages of vLLM's CPU kernels, element by element, as its C++ sources have them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Offset = Callable[[int, int, int, int], int]
"""(token, dim, block_size, head_dim) -> the element's place in the page."""


def vec_key(token: int, dim: int, block_size: int, head_dim: int) -> int:
    return dim * block_size + token


def vec_value(token: int, dim: int, block_size: int, head_dim: int) -> int:
    return token * head_dim + dim


def amx_key(token: int, dim: int, block_size: int, head_dim: int) -> int:
    return token // 16 * 16 * head_dim + dim // 2 * 32 + token % 16 * 2 + dim % 2


def amx_value(token: int, dim: int, block_size: int, head_dim: int) -> int:
    return dim // 16 * 16 * block_size + token // 2 * 32 + dim % 16 * 2 + token % 2


OFFSETS: dict[str, tuple[Offset, Offset]] = {"vec": (vec_key, vec_value), "amx": (amx_key, amx_value)}


def write(name: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Return a kernel that writes [tokens, heads, dim] into a cache [blocks, heads, size, 2 * dim] at slots."""

    def kernel(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        blocks, heads, size, width = cache.shape
        pages = cache.view(blocks, heads, 2, size * width // 2)
        grid = [(t, d) for t in range(size) for d in range(width // 2)]
        for kind, offset in enumerate(OFFSETS[name]):
            places = torch.tensor([offset(t, d, size, width // 2) for t, d in grid]).view(size, width // 2)
            rows = (keys, values)[kind]
            for row, slot in enumerate(slots.tolist()):
                pages[slot // size, :, kind, places[slot % size]] = rows[row]

    return kernel

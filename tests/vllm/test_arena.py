from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tandem.errors import ConfigError
from tandem.kv.shard import shard
from tandem.vllm.arena import Arena
from tandem.vllm.pages import AMX, KNOWN_LAYOUTS, VEC, PageLayout
from tests.vllm.reference import write

LAYERS, HEADS, SIZE, DIM = 3, 2, 32, 32
BLOCK_BYTES = LAYERS * HEADS * 2 * SIZE * DIM * 4


def caches(blocks: int) -> list[Tensor]:
    return [torch.zeros(blocks, HEADS, SIZE, 2 * DIM) for _ in range(LAYERS)]


def arena(cache: list[Tensor], pages: PageLayout, max_bytes: int = 8 * BLOCK_BYTES) -> Arena:
    return Arena(cache, shard(LAYERS, HEADS, tp=1, pp=1, tp_rank=0, pp_rank=0), pages, max_bytes)


@pytest.mark.parametrize("pages", KNOWN_LAYOUTS, ids=lambda pages: pages.name)
def test_tokens_that_the_kernel_wrote_lie_plain_in_the_arena(pages: PageLayout) -> None:
    cache = caches(4)
    keys, values = torch.randn(LAYERS, 2 * SIZE, HEADS, DIM), torch.randn(LAYERS, 2 * SIZE, HEADS, DIM)
    slots = torch.cat((torch.arange(SIZE) + 3 * SIZE, torch.arange(SIZE) + SIZE))  # blocks 3 and 1
    for layer in range(LAYERS):
        write(pages.name)(keys[layer], values[layer], cache[layer], slots)
    here = arena(cache, pages)
    here.export([3, 1], [6, 2])
    for place, block in enumerate((6, 2)):
        span = slice(place * SIZE, (place + 1) * SIZE)
        for kind, wanted in enumerate((keys, values)):
            # [heads, layers, tokens, dim]
            assert torch.equal(here.kv[block, :, :, kind], wanted[:, span].permute(2, 0, 1, 3))
    others = [block for block in range(here.blocks) if block not in (6, 2)]
    assert not here.kv[others].any()


@pytest.mark.parametrize("source", KNOWN_LAYOUTS, ids=lambda pages: pages.name)
@pytest.mark.parametrize("target", KNOWN_LAYOUTS, ids=lambda pages: pages.name)
def test_kv_goes_from_one_kernels_pages_into_anothers(source: PageLayout, target: PageLayout) -> None:
    theirs, ours, wanted = caches(3), caches(3), caches(3)
    for layer in range(LAYERS):
        keys, values = torch.randn(SIZE, HEADS, DIM), torch.randn(SIZE, HEADS, DIM)
        write(source.name)(keys, values, theirs[layer], torch.arange(SIZE))
        write(target.name)(keys, values, wanted[layer], torch.arange(SIZE) + 2 * SIZE)
    sender, receiver = arena(theirs, source), arena(ours, target)
    sender.export([0], [1])
    receiver.kv[7] = sender.kv[1]
    receiver.load([2], [7])
    assert all(torch.equal(one, other) for one, other in zip(ours, wanted, strict=True))


def test_an_arena_without_room_says_what_it_needs() -> None:
    assert arena(caches(1), VEC, 2 * BLOCK_BYTES).blocks == 2
    with pytest.raises(ConfigError, match=str(BLOCK_BYTES)):
        arena(caches(1), AMX, 2 * BLOCK_BYTES - 1)

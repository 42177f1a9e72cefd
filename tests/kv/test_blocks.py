"""The block pool, by example and against a model."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tandem.kv.blocks import BlockPool, PrefixChain

SIZE = 4


def publish(pool: BlockPool, tokens: list[int], blocks: list[int]) -> None:
    chain = PrefixChain(tokens, pool.block_size)
    for index, block in enumerate(blocks[: len(tokens) // pool.block_size]):
        pool.publish(block, chain.digest(index))


def cached_pool(num_blocks: int, tokens: list[int]) -> tuple[BlockPool, list[int]]:
    pool = BlockPool(num_blocks, SIZE)
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    assert blocks is not None
    publish(pool, tokens, blocks)
    pool.free(blocks)
    return pool, blocks


def match(pool: BlockPool, tokens: list[int], max_tokens: int | None = None) -> list[int]:
    return pool.match_prefix(PrefixChain(tokens, SIZE), len(tokens) if max_tokens is None else max_tokens)


def test_freed_blocks_are_found_again_by_their_tokens() -> None:
    tokens = list(range(10))
    pool, blocks = cached_pool(8, tokens)
    assert match(pool, tokens) == blocks[:2]
    assert [pool.references(block) for block in blocks] == [1, 1, 0]


def test_a_match_stops_at_the_first_token_that_differs_and_at_the_bound() -> None:
    tokens = list(range(12))
    pool, blocks = cached_pool(8, tokens)
    assert match(pool, [*tokens[:5], 99, *tokens[6:]]) == blocks[:1]
    assert match(pool, tokens, max_tokens=11) == blocks[:2]
    assert match(pool, [99, *tokens[1:]]) == []


def test_equal_blocks_after_different_ones_are_not_confused() -> None:
    pool, _ = cached_pool(8, [1, 1, 1, 1, 5, 5, 5, 5])
    assert match(pool, [5, 5, 5, 5]) == []


def test_the_tail_of_the_longest_unused_prefix_is_evicted_first() -> None:
    tokens = list(range(12))
    pool, blocks = cached_pool(4, tokens)
    assert pool.allocate(2) is not None
    assert match(pool, tokens) == blocks[:2]


def test_use_saves_a_block_from_eviction() -> None:
    pool = BlockPool(2, SIZE)
    old, new = [1] * SIZE, [2] * SIZE
    for tokens in (old, new):
        blocks = pool.allocate(1)
        assert blocks is not None
        publish(pool, tokens, blocks)
        pool.free(blocks)
    pool.free(match(pool, old))
    assert pool.allocate(1) is not None
    assert len(match(pool, old)) == 1
    assert match(pool, new) == []


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(3, SIZE)
    assert pool.allocate(4) is None
    assert pool.usage().free == 3


def test_the_first_of_two_blocks_with_equal_content_stays_the_one() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(1), pool.allocate(1)
    assert first is not None
    assert second is not None
    publish(pool, [7] * SIZE, first)
    publish(pool, [7] * SIZE, second)
    pool.free(second)
    assert pool.usage().cached == 0
    assert match(pool, [7] * SIZE) == first
    pool.check()


def test_forgotten_blocks_are_not_found_and_become_free() -> None:
    tokens = list(range(8))
    pool, blocks = cached_pool(4, tokens)
    held = match(pool, tokens[:4])
    pool.forget(blocks)
    pool.check()
    assert match(pool, tokens) == []
    pool.free(held)
    assert pool.usage().free == 4


def test_quarantined_blocks_stay_out_until_the_read_has_ended() -> None:
    pool = BlockPool(3, SIZE)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.quarantine(blocks)
    assert pool.allocate(2) is None
    assert pool.usage().quarantined == 2
    pool.unquarantine(blocks)
    assert pool.allocate(3) is not None


def test_a_block_that_others_share_cannot_be_quarantined() -> None:
    tokens = list(range(4))
    pool, blocks = cached_pool(3, tokens)
    match(pool, tokens)
    match(pool, tokens)
    with pytest.raises(ValueError, match="2 references"):
        pool.quarantine(blocks)


def test_a_block_counts_as_leased_only_while_leases_alone_hold_it() -> None:
    tokens = list(range(8))
    pool, _ = cached_pool(4, tokens)
    leased = match(pool, tokens)
    pool.lease(leased)
    running = match(pool, tokens[:4])
    assert (pool.usage().leased, pool.usage().in_use) == (1, 1)
    pool.free(running)
    assert pool.usage().leased == 2
    pool.unlease(leased)
    assert (pool.usage().leased, pool.usage().cached) == (0, 2)


def test_giving_back_too_often_is_an_error() -> None:
    pool, blocks = cached_pool(2, [1, 2, 3, 4])
    with pytest.raises(ValueError, match="nobody holds it"):
        pool.free(blocks)
    with pytest.raises(ValueError, match="not leased"):
        pool.unlease(blocks)


def test_a_chain_goes_on_with_tokens_that_come_later() -> None:
    tokens = [1, 2, 3, 4, 5]
    chain = PrefixChain(tokens, SIZE)
    first = chain.digest(0)
    with pytest.raises(IndexError, match="not full"):
        chain.digest(1)
    tokens += [6, 7, 8]
    assert chain.digest(1) == PrefixChain(list(range(1, 9)), SIZE).digest(1)
    assert chain.digest(0) == first


def test_chains_of_other_salts_have_nothing_in_common() -> None:
    tokens = list(range(2 * SIZE))
    chains = [PrefixChain(tokens, SIZE, salt) for salt in ("", "a", "b")]
    assert len({chain.digest(index) for chain in chains for index in range(2)}) == 6
    assert PrefixChain(tokens, SIZE, "a").digest(1) == chains[1].digest(1)


def test_a_pool_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="0 blocks"):
        BlockPool(0, SIZE)


class PoolMachine(RuleBasedStateMachine):
    """Random users of a tiny pool; the model remembers what each block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, 2)
        self.held: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}

    tables = Bundle("tables")
    leased = Bundle("leased")
    quarantined = Bundle("quarantined")

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), max_size=8))
    def compute(self, tokens: list[int]) -> list[int]:
        """Match what is there, allocate the rest, compute and publish it."""
        chain = PrefixChain(tokens, 2)
        hit = self.pool.match_prefix(chain, len(tokens))
        for index, block in enumerate(hit):
            assert self.content[block] == tuple(tokens[: 2 * index + 2])
        rest = self.pool.allocate(self.pool.blocks_for(len(tokens)) - len(hit))
        if rest is None:
            self.pool.free(hit)
            return []
        blocks = hit + rest
        for index in range(len(hit), len(blocks)):
            self.content[blocks[index]] = tuple(tokens[: 2 * index + 2])
            if 2 * index + 2 <= len(tokens):
                self.pool.publish(blocks[index], chain.digest(index))
        self.held.append(blocks)
        return blocks

    @rule(blocks=consumes(tables))
    def free(self, blocks: list[int]) -> None:
        if blocks:
            self.held.remove(blocks)
            self.pool.free(blocks)

    @rule(target=leased, blocks=consumes(tables))
    def lease(self, blocks: list[int]) -> list[int]:
        self.pool.lease(blocks)
        return blocks

    @rule(blocks=consumes(leased))
    def unlease(self, blocks: list[int]) -> None:
        if blocks:
            self.held.remove(blocks)
            self.pool.unlease(blocks)

    @rule(target=quarantined, count=st.integers(1, 3))
    def quarantine(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count) or []
        self.pool.quarantine(blocks)
        return blocks

    @rule(blocks=consumes(quarantined))
    def unquarantine(self, blocks: list[int]) -> None:
        self.pool.unquarantine(blocks)

    @rule(blocks=tables)
    def forget(self, blocks: list[int]) -> None:
        self.pool.forget(blocks)

    @invariant()
    def nothing_contradicts(self) -> None:
        self.pool.check()
        for block in range(6):
            assert self.pool.references(block) == sum(table.count(block) for table in self.held)
        usage = self.pool.usage()
        assert usage.free + usage.cached + usage.in_use + usage.leased + usage.quarantined == usage.blocks


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPoolMachine = PoolMachine.TestCase

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.models.block_table import BlockTable
from tandem.models.forward_batch import (
    GROUP_SAVES,
    DecodeGroup,
    ForwardRow,
    PrefillRow,
    build_forward_batch,
    group_by_length,
)

BLOCK_SIZE = 4


@st.composite
def rows(draw: st.DrawFn) -> list[ForwardRow]:
    made: list[ForwardRow] = []
    next_block = 0
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, 30))
        tokens = draw(st.lists(st.integers(0, 99), min_size=1, max_size=draw(st.sampled_from([1, 9]))))
        count = -(-(start + len(tokens)) // BLOCK_SIZE) + draw(st.integers(0, 2))
        made.append(ForwardRow(tokens, start, BlockTable(range(next_block, next_block + count))))
        next_block += count
    return made


@settings(max_examples=60, deadline=None)
@given(rows())
def test_every_new_token_has_its_position_and_slot_and_every_row_its_last_token(given_rows: list[ForwardRow]) -> None:
    batch = build_forward_batch(given_rows, "cpu", BLOCK_SIZE)
    expected = sorted(
        (blocks.ids[p // BLOCK_SIZE], p % BLOCK_SIZE, p, token)
        for tokens, start, blocks in given_rows
        for p, token in enumerate(tokens, start)
    )
    columns = (batch.slot_blocks, batch.slot_offsets, batch.positions, batch.token_ids)
    assert sorted(zip(*(c.tolist() for c in columns), strict=True)) == expected
    for (tokens, start, blocks), last in zip(given_rows, batch.last_tokens.tolist(), strict=True):
        end = start + len(tokens) - 1
        assert [int(c[last]) for c in columns] == [
            blocks.ids[end // BLOCK_SIZE],
            end % BLOCK_SIZE,
            end,
            tokens[-1],
        ]
    assert batch.end == max(start + len(tokens) for tokens, start, _ in given_rows)


@settings(max_examples=60, deadline=None)
@given(rows())
def test_groups_and_prefill_rows_cover_the_batch_in_order(given_rows: list[ForwardRow]) -> None:
    batch = build_forward_batch(given_rows, "cpu", BLOCK_SIZE)
    parts: list[DecodeGroup | PrefillRow] = [*batch.decode, *batch.prefill]
    spans = [(part.first, part.stop) for part in parts]
    assert [i for first, stop in spans for i in range(first, stop)] == list(range(batch.num_tokens))
    for group in batch.decode:
        lengths = group.lengths.tolist()
        assert lengths == sorted(lengths, reverse=True)
        assert group.longest == lengths[0]
        assert group.is_even == (len(set(lengths)) == 1)
        assert group.blocks.shape[1] == -(-group.longest // BLOCK_SIZE)
    assert [(row.stop - row.first, row.start) for row in batch.prefill] == [
        (len(tokens), start) for tokens, start, _ in given_rows if len(tokens) > 1
    ]


def test_rows_of_very_different_length_are_not_padded_to_the_longest() -> None:
    assert group_by_length([]) == []
    assert group_by_length([500, 400, 300]) == [range(3)]
    assert group_by_length([4000, 10, 9, 8]) == [range(1), range(1, 4)]
    assert group_by_length([GROUP_SAVES // 2, 1]) == [range(2)]


@pytest.mark.parametrize("row", [ForwardRow([], 3, BlockTable([0])), ForwardRow([1, 2], 3, BlockTable([0]))])
def test_a_row_without_tokens_or_with_too_few_blocks_is_refused(row: ForwardRow) -> None:
    with pytest.raises(ValueError, match="a row needs tokens and a block for each"):
        build_forward_batch([row], "cpu", BLOCK_SIZE)

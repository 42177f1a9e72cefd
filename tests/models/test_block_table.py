"""A block table grows in place, at a cost of what is added."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.models.block_table import BlockTable


@given(st.lists(st.lists(st.integers(0, 1 << 40), max_size=40), max_size=20))
def test_list_and_tensor_hold_all_blocks_in_order(parts: list[list[int]]) -> None:
    table = BlockTable(parts[0] if parts else ())
    for part in parts[1:]:
        table.extend(part)
    expected = [block for part in parts for block in part]
    assert table.ids == expected
    assert len(table) == len(expected)
    for count in {0, len(expected) // 2, len(expected)}:
        assert table.first(count).tolist() == expected[:count]


def test_a_table_that_grows_block_by_block_is_copied_a_logarithmic_number_of_times() -> None:
    table = BlockTable([0])
    places = {table.first(1).data_ptr()}
    for block in range(1, 5000):
        table.extend([block])
        places.add(table.first(1).data_ptr())
    assert table.first(5000).tolist() == list(range(5000))
    assert len(places) <= 10


def test_what_a_step_takes_of_a_table_is_no_copy() -> None:
    table = BlockTable(range(100))
    assert table.first(100).data_ptr() == table.first(7).data_ptr()


def test_a_table_does_not_change_the_list_that_it_was_made_of() -> None:
    ids = [1, 2]
    BlockTable(ids).extend([3])
    assert ids == [1, 2]

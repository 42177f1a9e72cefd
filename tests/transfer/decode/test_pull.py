"""Every wanted token is read once, in whichever order things become known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.errors import WireError
from tandem.transfer.decode.pull import Pull
from tandem.wire.peer_messages import KvComputed

SIZE = 4


def computed(first: int, blocks: list[int], tokens: int, final: bool = False, token: int | None = None) -> KvComputed:
    return KvComputed("first", "r", first, blocks, tokens, final, token)


def pull() -> Pull:
    return Pull("r", "r", "prefill-0", True)


def test_nothing_is_read_before_there_are_blocks_on_both_sides() -> None:
    one = pull()
    assert one.next_read(SIZE) is None
    one.announced(computed(0, [5, 6], 8), 0.0)
    assert one.next_read(SIZE) is None
    one.allocated([1, 2, 3], 0, 10)
    assert one.next_read(SIZE) == (0, 8)
    assert one.next_read(SIZE) is None


def test_a_block_that_may_still_grow_is_left_for_the_next_chunk() -> None:
    one = pull()
    one.allocated([1, 2, 3], 0, 10)
    one.announced(computed(0, [5, 6], 7), 0.0)
    assert one.next_read(SIZE) == (0, 4)
    one.announced(computed(1, [6, 7], 10, True, 9), 1.0)
    assert one.next_read(SIZE) == (4, 10)
    assert (one.source_blocks, one.first_token, one.final_at) == ([5, 6, 7], 9, 1.0)


def test_what_is_cached_is_not_read() -> None:
    one = pull()
    one.announced(computed(0, [5, 6, 7], 10, True, 9), 0.0)
    one.allocated([1, 2, 3], 4, 10)
    assert one.next_read(SIZE) == (4, 10)


def test_a_prompt_that_is_all_cached_has_arrived_once_it_is_computed_over_there() -> None:
    one = pull()
    one.allocated([1, 2], 8, 8)
    assert not one.arrived
    one.announced(computed(0, [5, 6], 8, True, 9), 0.0)
    assert one.next_read(SIZE) is None
    assert one.arrived


def test_it_has_arrived_when_no_rank_reads_any_more() -> None:
    one = pull()
    one.allocated([1], 0, 4)
    one.announced(computed(0, [5], 4, True, 9), 0.0)
    assert not one.arrived
    one.next_read(SIZE)
    one.jobs[1] = {0}
    assert not one.arrived
    del one.jobs[1]
    assert one.arrived


def test_a_pull_that_has_ended_reads_no_more_and_never_arrives() -> None:
    one = pull()
    one.allocated([1], 0, 4)
    one.announced(computed(0, [5], 4, True, 9), 0.0)
    one.ended = "why"
    assert one.next_read(SIZE) is None
    assert not one.arrived


def test_a_chunk_whose_predecessor_never_came_is_an_error() -> None:
    one = pull()
    one.announced(computed(0, [5], 4), 0.0)
    with pytest.raises(WireError, match="from 2 on"):
        one.announced(computed(2, [7], 12, True, 9), 0.0)


def test_more_tokens_than_blocks_are_a_contradiction() -> None:
    one = pull()
    one.announced(computed(0, [5], 5), 0.0)
    assert "5 tokens" in (one.contradiction(SIZE) or "")


@pytest.mark.parametrize(("tokens", "final", "fits"), [(8, False, True), (8, True, False), (10, True, True)])
def test_a_prompt_of_another_length_is_a_contradiction(tokens: int, final: bool, fits: bool) -> None:
    one = pull()
    one.announced(computed(0, [5, 6, 7], tokens, final), 0.0)
    assert one.contradiction(SIZE) is None
    one.allocated([1, 2, 3], 0, 10)
    assert (one.contradiction(SIZE) is None) == fits


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_every_wanted_token_is_read_once_whatever_comes_first(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 40))
    size = data.draw(st.sampled_from([1, 3, 4]))
    cached = data.draw(st.integers(0, total))
    ends = sorted(data.draw(st.sets(st.integers(1, total), max_size=4)) | {total})
    blocks = list(range(100, 100 - -total // size + 1))
    allocated_after = data.draw(st.integers(0, len(ends)))
    one = pull()
    reads: list[tuple[int, int]] = []
    begin = 0
    for number in range(len(ends) + 1):
        if number == allocated_after:
            one.allocated(list(range(total + 1)), cached, total)
        if (span := one.next_read(size)) is not None:
            reads.append(span)
        if number == len(ends):
            break
        end = ends[number]
        first = begin // size
        one.announced(computed(first, blocks[first : -(-end // size)], end, end == total, 9), 0.0)
        assert one.contradiction(size) is None
        begin = end
        if (span := one.next_read(size)) is not None:
            reads.append(span)
            # Only whole blocks are read before the last chunk: the rest of one may not be there yet.
            assert end == total or span[1] % size == 0
    assert [token for start, stop in reads for token in range(start, stop)] == list(range(cached, total))
    assert one.arrived

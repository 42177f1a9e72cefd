"""Every rank knows block tables and histories as the leader does, although each step tells it only what is new."""

from __future__ import annotations

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.engine.step.rank_requests import RankRequests
from tandem.engine.step.step_message import Appended, Step, StepEncoder, StepRow
from tandem.errors import EngineFailed
from tandem.scheduling.batch import Batch, Row, SampleAt
from tandem.wire.sampling import SamplingParams

VOCABULARY = 8


def decode_row(request_id: str, blocks: list[int], history: list[int] | None = None, prompt_len: int = 1) -> Row:
    position = len(history) if history is not None else 9
    return Row(request_id, [1], 0, blocks, SampleAt(SamplingParams(), position, position - prompt_len), history)


def over_the_wire(step: Step) -> Step:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(step), type=Step)


def follower(*, samples: bool = True) -> RankRequests:
    return RankRequests(torch.device("cpu"), samples=samples)


def told(step: Step) -> int:
    """The number of blocks and tokens of histories that a step tells."""
    return sum(len(row.blocks.items) + (len(row.history.items) if row.history else 0) for row in step.rows)


operation = st.tuples(
    st.sampled_from(["grow", "grow", "grow", "replace", "forget history", "reuse"]),
    st.integers(0, 4),
    st.lists(st.integers(0, VOCABULARY - 1), max_size=4),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.lists(operation, max_size=4), st.sets(st.integers(0, 4), min_size=1)), max_size=20),
    st.integers(1, 5),
)
def test_a_follower_has_what_the_leader_has_of_every_row(
    steps: list[tuple[list[tuple[str, int, list[int]]], set[int]]], kept: int
) -> None:
    """Tables grow, are taken by preemption, and end; ids are used again; rows skip steps and are forgotten."""
    encoder, rank = StepEncoder(kept), follower()
    blocks: dict[int, list[int]] = {request: [request] for request in range(5)}
    tokens: dict[int, list[int] | None] = {request: [1] for request in range(5)}
    for operations, rows in steps:
        for name, request, items in operations:
            history = tokens[request]
            match name:
                case "grow":
                    blocks[request].extend(items)
                    if history is not None:
                        history.extend(items)
                case "replace":
                    blocks[request] = [*items, 7]
                case "forget history":
                    tokens[request] = None
                case "reuse":
                    blocks[request], tokens[request] = [*items], [1, *items]
        batch = Batch(0, [decode_row(str(row), blocks[row], tokens[row]) for row in sorted(rows)])
        rank.take(over_the_wire(encoder.step(batch)))
        assert len(rank) <= max(kept, len(rows))
        for row in rows:
            known, history = rank[str(row)], tokens[row]
            assert known.table.ids == blocks[row]
            if history is not None:
                assert known.counts is not None
                seen, counts = known.counts.occurrences(torch.zeros(VOCABULARY))
                assert seen.tolist() == [token in history for token in range(VOCABULARY)]
                assert counts.tolist() == [history[1:].count(token) for token in range(VOCABULARY)]


def test_a_step_tells_what_is_new_however_long_the_contexts_are() -> None:
    sizes, items = [], []
    for length in (1, 2048):
        encoder = StepEncoder(64)
        blocks = [[100_000 + block for block in range(length)] for _ in range(64)]
        rows = [Row(str(row), [1], 70_000, mine) for row, mine in enumerate(blocks)]
        assert told(encoder.step(Batch(0, rows))) == 64 * length
        sizes.append(len(msgspec.msgpack.encode(encoder.step(Batch(1, rows)))))
        blocks[3].append(7)
        items.append(told(encoder.step(Batch(2, rows))))
    assert items == [1, 1]
    assert sizes[1] - sizes[0] == 64 * 2  # the place from which on a table is new: an integer of 3 bytes for one of 1


def test_a_history_is_told_once() -> None:
    encoder, history = StepEncoder(4), [1] * 1000
    assert told(encoder.step(Batch(0, [decode_row("a", [1], history)]))) == 1001
    history.append(2)
    assert told(encoder.step(Batch(1, [decode_row("a", [1], history)]))) == 2  # another table of one block, one token


def test_ranks_that_do_not_sample_count_nothing() -> None:
    rank = follower(samples=False)
    rank.take(StepEncoder(4).step(Batch(0, [decode_row("a", [1], [1, 2, 3])])))
    assert rank["a"].counts is None


def test_the_least_recently_used_request_is_forgotten_and_told_whole_when_it_comes_back() -> None:
    encoder, rank = StepEncoder(2), follower()
    blocks = {name: [ord(name)] * 3 for name in "abc"}
    for name in "abac":
        rank.take(encoder.step(Batch(0, [decode_row(name, blocks[name])])))
    step = encoder.step(Batch(0, [decode_row("a", blocks["a"])]))
    assert told(step) == 0
    rank.take(step)
    step = encoder.step(Batch(0, [decode_row("b", blocks["b"])]))
    assert (told(step), step.forgotten) == (3, ["c"])
    rank.take(step)
    assert rank["b"].table.ids == blocks["b"]


def test_more_rows_than_are_kept_are_all_kept_for_their_step() -> None:
    encoder, rank = StepEncoder(1), follower()
    rank.take(encoder.step(Batch(0, [decode_row(name, [1]) for name in "abc"])))
    assert [rank[name].table.ids for name in "abc"] == [[1]] * 3


@pytest.mark.parametrize("row", [
    StepRow("a", [1], 0, Appended(2, [5])),
    StepRow("a", [1], 0, Appended(4, [5])),
    StepRow("unknown", [1], 0, Appended(1, [5])),
    StepRow("a", [1], 0, Appended(3, []), SampleAt(SamplingParams(), 3, 1), Appended(2, [5])),
])  # fmt: skip
def test_a_rank_that_has_missed_a_step_ends_the_engine_rather_than_guess(row: StepRow) -> None:
    rank = follower()
    rank.take(Step(0, [StepRow("a", [1], 0, Appended(0, [1, 2, 3]))]))
    with pytest.raises(EngineFailed, match=r"this rank has (no|3) (blocks|tokens) of request (a|unknown), the leader"):
        rank.take(Step(1, [row]))

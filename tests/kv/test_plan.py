"""Plans against a reference that moves one head of one token at a time."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.kv.layout import (
    BLOCK_MAJOR,
    LAYER_MAJOR,
    TOKEN_MAJOR,
    Axis,
    Dimension,
    KvLayout,
    LayoutError,
    Shard,
    Span,
    packed,
)
from tandem.kv.plan import TransferPlan, plan, sources_of_all
from tandem.kv.runs import Runs
from tandem.kv.shard import shard

HEADS_OF_TOKEN = (Axis.BLOCK, Axis.TOKEN, Axis.LAYER, Axis.KV, Axis.HEAD, Axis.DIM)


@dataclass(frozen=True)
class Model:
    layers: int = 3
    heads: int = 4
    kv: int = 2
    dim: int = 2
    itemsize: int = 2

    @property
    def unit(self) -> int:
        return self.dim * self.itemsize

    def values(self, tokens: int) -> np.ndarray:
        """Bytes [token, layer, kv, head, dim * itemsize] of elements that all differ."""
        shape = (tokens, self.layers, self.kv, self.heads, self.dim)
        elements = np.arange(1, np.prod(shape) + 1).astype(f"u{self.itemsize}").reshape(shape)
        return elements.view(np.uint8).reshape(*shape[:-1], self.unit)


@dataclass(frozen=True)
class Engine:
    tp: int = 1
    pp: int = 1
    order: tuple[Axis, ...] = BLOCK_MAJOR
    block_size: int = 4
    block_ids: tuple[int, ...] = (6, 1, 8, 3)
    spare: int = 1
    stages: tuple[int, ...] | None = None
    gaps: tuple[int, ...] = (0, 0, 0, 0, 0)

    def ranks(self, model: Model) -> list[KvLayout]:
        blocks = max(self.block_ids) + 1 + self.spare
        shards = [
            shard(model.layers, model.heads, tp=self.tp, pp=self.pp, tp_rank=t, pp_rank=p, stages=self.stages)
            for p in range(self.pp)
            for t in range(self.tp)
        ]
        return [self._with_gaps(model, s, blocks) for s in shards]

    def _with_gaps(self, model: Model, held: Shard, blocks: int) -> KvLayout:
        whole = packed(
            self.order,
            held,
            blocks=blocks,
            block_size=self.block_size,
            head_dim=model.dim,
            itemsize=model.itemsize,
            kv=model.kv,
        )
        dimensions = [whole.dimensions[-1]]
        for old, gap in zip(reversed(whole.dimensions[:-1]), self.gaps, strict=True):
            stride = dimensions[0].size * dimensions[0].stride + gap
            dimensions.insert(0, Dimension(old.axis, old.size, stride))
        return KvLayout(tuple(dimensions), model.itemsize, held)


def token_within_block(axes: list[Axis]) -> tuple[Axis, ...]:
    block, token = sorted((axes.index(Axis.BLOCK), axes.index(Axis.TOKEN)))
    axes[block], axes[token] = Axis.BLOCK, Axis.TOKEN
    return (*axes, Axis.DIM)


@st.composite
def engines(draw: st.DrawFn, model: Model, tokens: int) -> Engine:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    count = -(-tokens // block_size)
    spare = draw(st.integers(0, 3))
    ascending = st.integers(0, spare).map(lambda first: list(range(first, first + count)))
    ids = draw(
        ascending
        | ascending.map(lambda ids: ids[::-1])
        | st.permutations(range(count + spare)).map(lambda ids: ids[:count])
    )
    pp = draw(st.integers(1, min(3, model.layers)))
    cuts = sorted(draw(st.permutations(range(1, model.layers)))[: pp - 1])
    stages = tuple(b - a for a, b in zip([0, *cuts], [*cuts, model.layers], strict=True))
    return Engine(
        tp=draw(st.integers(1, 8)),
        pp=pp,
        order=draw(
            st.sampled_from([BLOCK_MAJOR, TOKEN_MAJOR, LAYER_MAJOR, HEADS_OF_TOKEN])
            | st.permutations(BLOCK_MAJOR[:-1]).map(token_within_block)
        ),
        block_size=block_size,
        block_ids=tuple(ids),
        spare=spare,
        stages=draw(st.sampled_from([None, stages])),
        gaps=draw(st.just((0,) * 5) | st.tuples(*[st.sampled_from([0, 0, 1, 4])] * 5)),
    )


@dataclass(frozen=True)
class Transfer:
    model: Model
    src: Engine
    dst: Engine
    start: int
    stop: int

    @property
    def capacity(self) -> int:
        """Tokens for which both sides have blocks."""
        return min(len(e.block_ids) * e.block_size for e in (self.src, self.dst))


@st.composite
def transfers(draw: st.DrawFn) -> Transfer:
    latent = draw(st.booleans())
    model = Model(
        layers=draw(st.integers(1, 5)),
        heads=1 if latent else draw(st.integers(1, 6)),
        kv=1 if latent else 2,
        dim=draw(st.integers(1, 3)),
        itemsize=draw(st.sampled_from([2, 4])),
    )
    stop = draw(st.integers(1, 26))
    start = draw(st.integers(0, stop - 1))
    return Transfer(model, draw(engines(model, stop)), draw(engines(model, stop)), start, stop)


def heads_of_tokens(layout: KvLayout, tokens: range) -> Iterator[tuple[int, int, int, int]]:
    """Every (token, layer, kv, head) that the rank holds."""
    return product(tokens, layout.layers.indices, range(layout.size(Axis.KV)), layout.heads.indices)


def address(layout: KvLayout, block_ids: Sequence[int], at: tuple[int, int, int, int]) -> int:
    token, layer, kv, head = at
    index = {
        Axis.BLOCK: block_ids[token // layout.block_size],
        Axis.TOKEN: token % layout.block_size,
        Axis.LAYER: layer - layout.layers.start,
        Axis.KV: kv,
        Axis.HEAD: head - layout.heads.start,
        Axis.DIM: 0,
    }
    return sum(index[d.axis] * d.stride for d in layout.dimensions)


def filled(layout: KvLayout, block_ids: Sequence[int], values: np.ndarray, tokens: range) -> np.ndarray:
    """The memory of a rank that holds its part of the values of these tokens, and zeros elsewhere."""
    memory = np.zeros(layout.nbytes, dtype=np.uint8)
    for at in heads_of_tokens(layout, tokens):
        where = address(layout, block_ids, at)
        memory[where : where + values.shape[-1]] = values[at]
    return memory


def fewest_runs(
    source: KvLayout, src_ids: Sequence[int], destination: KvLayout, dst_ids: Sequence[int], tokens: range
) -> int:
    """Counts the breaks between neighbours in source memory that both sides hold."""
    unit = source.head_dim * source.itemsize
    moves = sorted(
        (address(source, src_ids, at), address(destination, dst_ids, at))
        for at in heads_of_tokens(source, tokens)
        if at[1] in destination.layers.indices and at[3] in destination.heads.indices
    )
    follows = [(a[0] + unit, a[1] + unit) == b for a, b in pairwise(moves)]
    return len(moves) - sum(follows)


@settings(max_examples=200, deadline=None)
@given(transfers(), st.booleans())
def test_a_plan_moves_each_byte_of_the_tokens_once_in_the_fewest_runs(case: Transfer, whole_tail: bool) -> None:
    sources, destinations = case.src.ranks(case.model), case.dst.ranks(case.model)
    src_ids, dst_ids = case.src.block_ids, case.dst.block_ids
    values = case.model.values(case.capacity)
    size, stop = case.src.block_size, case.stop
    if whole_tail and size == case.dst.block_size and (stop - 1) // size * size >= case.start:
        stop = -(-stop // size) * size
    memories = [filled(layout, src_ids, values, range(case.capacity)) for layout in sources]

    for reader, destination in enumerate(destinations):
        planned = plan(sources, destinations, reader)
        runs = planned.runs(src_ids, np.array(dst_ids), case.start, case.stop, whole_tail=whole_tail)
        memory = np.zeros(destination.nbytes, dtype=np.uint8)
        written = np.zeros(destination.nbytes, dtype=np.int64)
        for source, copies in runs.items():
            for src, dst, length in zip(copies.src_offset, copies.dst_offset, copies.length, strict=True):
                memory[dst : dst + length] = memories[source][src : src + length]
                written[dst : dst + length] += 1
        ones = np.ones_like(values)
        assert np.array_equal(memory, filled(destination, dst_ids, values, range(case.start, stop)))
        assert np.array_equal(written, filled(destination, dst_ids, ones, range(case.start, stop)))
        assert {source: len(copies) for source, copies in runs.items()} == {
            source: fewest_runs(sources[source], src_ids, destination, dst_ids, range(case.start, stop))
            for source in planned.sources
        }


def only(planned: TransferPlan, *arguments: Any, **options: Any) -> Runs:
    (runs,) = planned.runs(*arguments, **options).values()
    return runs


@pytest.mark.parametrize(
    ("src_tp", "dst_tp"), [(8, 4), (8, 1), (4, 8), (1, 8), (6, 4), (4, 6), (3, 2), (16, 4), (5, 16)]
)
def test_engines_that_differ_in_tp_alone_need_one_run_a_block_and_source(src_tp: int, dst_tp: int) -> None:
    model = Model(layers=80, heads=8)
    ids = tuple(range(0, 100, 2))
    sources = Engine(tp=src_tp, block_ids=ids).ranks(model)
    destinations = Engine(tp=dst_tp, block_ids=ids).ranks(model)
    for reader, destination in enumerate(destinations):
        planned = plan(sources, destinations, reader)
        runs = planned.runs(ids, ids[::-1], 0, 4 * 50 - 1, whole_tail=True)
        assert {source: len(copies) for source, copies in runs.items()} == dict.fromkeys(planned.sources, 50)
        assert sum(copies.nbytes for copies in runs.values()) == destination.nbytes // destination.blocks * 50


@pytest.mark.parametrize("step", [1, -1])
@pytest.mark.parametrize(("order", "count"), [(BLOCK_MAJOR, 1), (TOKEN_MAJOR, 1), (LAYER_MAJOR, 3 * 2)])
def test_blocks_that_lie_side_by_side_on_both_sides_move_together(
    order: tuple[Axis, ...], count: int, step: int
) -> None:
    ids = tuple(range(20))[::step]
    engine = Engine(order=order, block_ids=ids).ranks(Model())
    assert len(only(plan(engine, engine, 0), ids, ids, 0, 80)) == count


def test_blocks_that_lie_side_by_side_on_one_side_move_one_by_one() -> None:
    engine = Engine(block_ids=tuple(range(40))).ranks(Model())
    assert len(only(plan(engine, engine, 0), list(range(20)), list(range(0, 40, 2)), 0, 80)) == 20


@pytest.mark.parametrize(("src_pp", "dst_pp", "sources"), [(4, 1, 4), (3, 2, 2), (1, 4, 1)])
def test_engines_that_differ_in_pp_need_one_run_a_block_and_head(src_pp: int, dst_pp: int, sources: int) -> None:
    model = Model(layers=12, heads=2)
    planned = plan(Engine(pp=src_pp).ranks(model), Engine(pp=dst_pp).ranks(model), 0)
    runs = planned.runs([0, 2, 4], [5, 3, 1], 0, 12)
    assert [len(copies) for copies in runs.values()] == [3 * 2] * sources


def test_a_run_goes_on_into_the_next_head_and_block_where_only_the_axes_within_differ() -> None:
    model = Model(layers=3, heads=2)
    keys_apart = (Axis.BLOCK, Axis.HEAD, Axis.KV, Axis.LAYER, Axis.TOKEN, Axis.DIM)
    planned = plan(Engine().ranks(model), Engine(order=keys_apart).ranks(model), 0)
    assert len(only(planned, [3], [6], 0, 4)) == 2 * 3 * 2 - 1
    assert len(only(planned, [3, 4, 5], [6, 7, 8], 0, 12)) == 3 * 2 * 3 * 2 - 5


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4)])
def test_a_run_goes_on_from_the_last_block_of_a_layer_into_the_first_of_the_next(sizes: tuple[int, int]) -> None:
    model = Model(layers=3, heads=1)
    larger = Engine(block_size=4, block_ids=(0,), spare=0).ranks(model)
    smaller = Engine(order=LAYER_MAJOR, block_size=2, block_ids=(3,), spare=0).ranks(model)
    sides = [(larger, [0]), (smaller, [0, 3])]
    (sources, src_ids), (destinations, dst_ids) = sides if sizes[0] > sizes[1] else sides[::-1]
    runs = only(plan(sources, destinations, 0), src_ids, dst_ids, 0, 4)
    assert len(runs) == 3 * 2 + 1


def test_blocks_that_cut_those_of_the_other_side_cut_no_run_where_they_lie_side_by_side() -> None:
    model = Model(layers=3, heads=1)
    sources = Engine(block_size=4).ranks(model)
    destinations = Engine(order=LAYER_MAJOR, block_size=6).ranks(model)
    assert len(only(plan(sources, destinations, 0), [5, 0, 3], [1, 2], 0, 12)) == 3 * 3 * 2


def test_without_whole_tail_nothing_after_the_last_token_is_touched() -> None:
    engine = Engine().ranks(Model())
    planned = plan(engine, engine, 0)
    exact = only(planned, [0], [2], 0, 3)
    whole = only(planned, [0], [2], 0, 3, whole_tail=True)
    assert exact.nbytes * 4 == whole.nbytes * 3
    assert (len(exact), len(whole)) == (3 * 2 * 4, 1)


@pytest.mark.parametrize(("start", "dst_block_size"), [(1, 4), (0, 8)])
def test_a_tail_that_would_not_make_a_whole_block_is_left(start: int, dst_block_size: int) -> None:
    planned = plan(Engine().ranks(Model()), Engine(block_size=dst_block_size).ranks(Model()), 0)
    exact, asked = (only(planned, [0], [2], start, 3, whole_tail=whole) for whole in (False, True))
    assert exact.nbytes == asked.nbytes


def test_no_tokens_need_no_runs() -> None:
    engine = Engine().ranks(Model())
    assert plan(engine, engine, 0).runs([], [], 5, 5) == {}


@settings(max_examples=50, deadline=None)
@given(transfers(), st.integers(1, 300))
def test_a_limit_on_runs_cuts_them_and_moves_the_same_bytes(case: Transfer, limit: int) -> None:
    planned = plan(case.src.ranks(case.model), case.dst.ranks(case.model), 0)
    for runs in planned.runs(case.src.block_ids, case.dst.block_ids, case.start, case.stop).values():
        cut = runs.at_most(limit)
        assert int(cut.length.max()) <= limit
        assert len(cut) == sum(-(-length // limit) for length in runs.length.tolist())
        assert moved(cut) == moved(runs)


def moved(runs: Runs) -> list[tuple[int, int]]:
    return [
        (src + i, dst + i)
        for src, dst, length in zip(*(x.tolist() for x in (runs.src_offset, runs.dst_offset, runs.length)), strict=True)
        for i in range(length)
    ]


SHAPES = st.tuples(st.integers(1, 12), st.integers(1, 3))


@settings(deadline=None)
@given(st.integers(1, 8), SHAPES, SHAPES, st.integers(0, 5))
def test_readers_spread_evenly_over_the_ranks_that_hold_the_same(
    heads: int, src: tuple[int, int], dst: tuple[int, int], turn: int
) -> None:
    model = Model(heads=heads)
    sources, destinations = Engine(*src).ranks(model), Engine(*dst).ranks(model)
    plans = [plan(sources, destinations, r, turn=turn) for r in range(len(destinations))]
    readers = Counter(source for planned in plans for source in planned.sources)
    for held in {s.shard for s in sources}:
        loads = [readers[i] for i, s in enumerate(sources) if s.shard == held]
        assert max(loads) - min(loads) <= 1


@settings(deadline=None)
@given(st.integers(1, 8), SHAPES, SHAPES, st.integers(0, 5))
def test_the_sources_of_all_readers_are_those_of_their_plans(
    heads: int, src: tuple[int, int], dst: tuple[int, int], turn: int
) -> None:
    model = Model(heads=heads)
    sources, destinations = Engine(*src).ranks(model), Engine(*dst).ranks(model)
    plans = [plan(sources, destinations, r, turn=turn).sources for r in range(len(destinations))]
    assert sources_of_all(sources, destinations, turn=turn) == plans


def test_as_many_readers_as_replicas_read_each_from_its_own() -> None:
    latent = Engine(tp=4).ranks(Model(heads=1, kv=1))
    assert [plan(latent, latent, r).sources for r in range(4)] == [(0,), (1,), (2,), (3,)]


def test_a_turn_sends_the_readers_of_another_engine_to_other_replicas_first() -> None:
    replicas, single = Engine(tp=4).ranks(Model(heads=2)), Engine().ranks(Model(heads=2))
    assert [plan(replicas, single, 0, turn=t).sources for t in range(3)] == [(0, 2), (1, 3), (0, 2)]


@settings(max_examples=50, deadline=None)
@given(transfers(), st.integers(0, 3))
def test_a_plan_of_only_the_sources_it_named_is_the_same(case: Transfer, turn: int) -> None:
    sources, destinations = case.src.ranks(case.model), case.dst.ranks(case.model)
    reader = len(destinations) - 1
    planned = plan(sources, destinations, reader, turn=turn)
    again = plan([sources[i] for i in planned.sources], destinations[reader:], 0)
    blocks = case.src.block_ids, case.dst.block_ids
    runs, same = (p.runs(*blocks, case.start, case.stop) for p in (planned, again))
    assert [moved(r) for r in runs.values()] == [moved(r) for r in same.values()]


def test_sources_that_overlap_in_part_are_each_read_for_what_only_they_hold() -> None:
    model = Model(layers=1, heads=3)
    held = [Shard(1, 3, Span(0, 1), Span(0, 2)), Shard(1, 3, Span(0, 1), Span(1, 3))]
    sources = [packed(BLOCK_MAJOR, s, blocks=4, block_size=4, head_dim=2, itemsize=2) for s in held]
    destinations = Engine(block_ids=(3,), spare=0).ranks(model)
    runs = plan(sources, destinations, 0).runs([1], [3], 0, 4)
    assert sum(r.nbytes for r in runs.values()) == destinations[0].nbytes // 4
    assert set(runs) == {0, 1}


@pytest.mark.parametrize(
    ("tp", "pp", "lost", "complaint"),
    [
        (2, 1, 1, r"one that holds heads \[2, 4\) of layers \[0, 3\), got none"),
        (1, 3, 1, r"one that holds heads \[0, 4\) of layers \[1, 2\), got none"),
        (1, 1, 0, r"one that holds heads \[0, 4\) of layers \[0, 3\), got none"),
    ],
)
def test_heads_and_layers_that_no_source_holds_are_named(tp: int, pp: int, lost: int, complaint: str) -> None:
    sources = Engine(tp=tp, pp=pp).ranks(Model())
    del sources[lost]
    with pytest.raises(LayoutError, match=complaint):
        plan(sources, Engine().ranks(Model()), 0)
    with pytest.raises(LayoutError, match=complaint):
        sources_of_all(sources, Engine().ranks(Model()))


def test_block_ids_must_be_within_the_smallest_of_the_sources() -> None:
    small, large = (Engine(tp=2, spare=spare).ranks(Model()) for spare in (0, 5))
    planned = plan([large[0], small[1]], Engine(spare=9).ranks(Model()), 0)
    with pytest.raises(LayoutError, match="source blocks: expected ids from 0 to 8, got 9 to 9"):
        planned.runs([9], [0], 0, 4)


def test_a_source_that_nobody_reads_may_be_lost() -> None:
    sources = Engine(tp=2).ranks(Model())
    assert plan(sources[:1], Engine(tp=2).ranks(Model()), 0).sources == (0,)


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (Model(layers=2), "num_layers of source 0: expected 3, got 2"),
        (Model(heads=2), "num_kv_heads of source 0: expected 4, got 2"),
        (Model(kv=1), "size of kv of source 0: expected 2, got 1"),
        (Model(dim=4), "head_dim of source 0: expected 2, got 4"),
        (Model(itemsize=4), "itemsize of source 0: expected 2, got 4"),
    ],
)
def test_engines_of_different_values_are_refused_with_both(other: Model, field: str) -> None:
    with pytest.raises(LayoutError, match=field):
        plan(Engine().ranks(other), Engine().ranks(Model()), 0)


def test_sources_of_different_block_sizes_are_refused() -> None:
    sources = [Engine(tp=2, block_size=size).ranks(Model())[i] for i, size in enumerate((4, 8))]
    with pytest.raises(LayoutError, match="block_size of source 1: expected 4, got 8"):
        plan(sources, Engine().ranks(Model()), 0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"src_blocks": [0, 1, 10, 3]}, "source blocks: expected ids from 0 to 9, got 1 to 10"),
        ({"dst_blocks": [0, 1, -1, 3]}, "destination blocks: expected ids from 0 to 9, got -1 to 3"),
        ({"dst_blocks": [0, 1, 3, 3]}, "destination blocks: expected each in one place"),
        ({"src_blocks": [0, 1, 1 << 63, 3]}, "source blocks: expected"),
        ({"src_blocks": [0, 1, 1 << 80, 3]}, "source blocks: expected one dimension of integers"),
        ({"src_blocks": [0.0, 1.0, 2.0, 3.0]}, "expected one dimension of integers, got 1 dimensions of float64"),
        ({"src_blocks": [[0], [1], [2], [3]]}, "expected one dimension of integers, got 2 dimensions of int64"),
        ({"src_blocks": [0, 1, 2]}, r"source blocks: expected blocks \[1, 4\) of the request, got \[0, 3\)"),
        ({"dst_blocks": [0]}, r"destination blocks: expected blocks \[1, 4\) of the request, got \[0, 1\)"),
        ({"start": 15}, r"tokens: expected 0 <= start <= stop, got \[15, 14\)"),
        ({"start": -1}, r"tokens: expected 0 <= start <= stop, got \[-1, 14\)"),
    ],
)
def test_blocks_and_tokens_that_cannot_be_are_refused(change: dict[str, Any], complaint: str) -> None:
    engine = Engine().ranks(Model())
    request: dict[str, Any] = {"src_blocks": [0, 1, 2, 3], "dst_blocks": [0, 1, 2, 3], "start": 5, "stop": 14}
    plan(engine, engine, 0).runs(**request)
    with pytest.raises(LayoutError, match=complaint):
        plan(engine, engine, 0).runs(**request | change)

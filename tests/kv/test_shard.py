"""The split of layers and heads over ranks."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.kv.layout import LayoutError, Shard, Span
from tandem.kv.shard import query_heads, shard


def heads_of(num_kv_heads: int, tp: int) -> list[Span]:
    return [shard(1, num_kv_heads, tp=tp, pp=1, tp_rank=r, pp_rank=0).heads for r in range(tp)]


def layers_of(num_layers: int, pp: int, stages: list[int] | None = None) -> list[Span]:
    return [shard(num_layers, 1, tp=1, pp=pp, tp_rank=0, pp_rank=r, stages=stages).layers for r in range(pp)]


def test_a_rank_holds_the_same_layers_of_its_own_heads() -> None:
    assert shard(5, 8, tp=4, pp=2, tp_rank=3, pp_rank=1) == Shard(5, 8, Span(3, 5), Span(6, 8))


@given(st.integers(1, 40), st.integers(1, 40))
def test_stages_hold_each_layer_once_as_evenly_as_can_be_and_the_first_ones_more(layers: int, pp: int) -> None:
    pp = min(layers, pp)
    spans = layers_of(layers, pp)
    sizes = [s.size for s in spans]
    assert [i for s in spans for i in s.indices] == list(range(layers))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] <= 1


def test_stages_of_uneven_size_follow_the_counts_given() -> None:
    assert layers_of(10, 3, [2, 5, 3]) == [Span(0, 2), Span(2, 7), Span(7, 10)]


@given(st.integers(1, 20), st.integers(1, 20))
def test_ranks_no_more_than_kv_heads_hold_each_head_once_as_evenly_as_can_be(heads: int, tp: int) -> None:
    tp = min(heads, tp)
    spans = heads_of(heads, tp)
    assert [i for s in spans for i in s.indices] == list(range(heads))
    assert max(s.size for s in spans) - min(s.size for s in spans) <= 1


@given(st.integers(1, 12), st.integers(1, 40))
def test_ranks_more_than_kv_heads_hold_one_each_and_every_head_about_as_often(heads: int, more: int) -> None:
    tp = heads + more
    spans = heads_of(heads, tp)
    assert [s.start for s in spans] == [rank * heads // tp for rank in range(tp)]
    assert {s.size for s in spans} == {1}
    replicas = Counter(s.start for s in spans)
    assert set(replicas) == set(range(heads))
    assert max(replicas.values()) - min(replicas.values()) <= 1


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 16))
def test_every_query_head_is_on_one_rank_which_holds_its_kv_head(kv_heads: int, group: int, tp: int) -> None:
    tp = min(tp, kv_heads * group)
    most_replicas = max(Counter(s.start for s in heads_of(kv_heads, tp)).values())
    if tp > kv_heads and most_replicas > group:
        with pytest.raises(LayoutError, match="ranks to a KV head"):
            [query_heads(kv_heads * group, kv_heads, tp=tp, tp_rank=r) for r in range(tp)]
        return
    spans = [query_heads(kv_heads * group, kv_heads, tp=tp, tp_rank=r) for r in range(tp)]
    assert [i for s in spans for i in s.indices] == list(range(kv_heads * group))
    for query, held in zip(spans, heads_of(kv_heads, tp), strict=True):
        assert {i // group for i in query.indices} == set(held.indices)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tp_rank": 2}, "tp_rank"),
        ({"tp_rank": -1}, "tp_rank"),
        ({"tp": 0}, "tp_rank"),
        ({"pp_rank": 2}, "pp_rank"),
        ({"pp": 0}, "pp_rank"),
        ({"pp": 5}, "pp"),
        ({"stages": [4]}, "stages"),
        ({"stages": [4, 0]}, "stages"),
        ({"stages": [2, 3]}, "stages"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_layers": 0}, "pp"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(change: dict[str, object], field: str) -> None:
    shape = {"num_layers": 4, "num_kv_heads": 4, "tp": 2, "pp": 2, "tp_rank": 0, "pp_rank": 0} | change
    with pytest.raises(LayoutError) as refused:
        shard(**shape)  # type: ignore[arg-type]
    assert refused.value.field == field


@pytest.mark.parametrize("num_heads", [0, 6, 3])
def test_query_heads_that_kv_heads_do_not_divide_are_refused(num_heads: int) -> None:
    with pytest.raises(LayoutError, match=rf"multiple of the 4 KV heads, got {num_heads}"):
        query_heads(num_heads, 4, tp=1, tp_rank=0)

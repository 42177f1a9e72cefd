"""The split of layers and heads over the ranks of an engine: the one place that decides it.

Tensor parallelism splits heads, pipeline parallelism splits layers. Every split is contiguous and as even as
it can be, the first ranks taking one more. Query heads follow the KV head that they attend to.
"""

from collections.abc import Sequence

from tandem.kv.layout import LayoutError, Shard, Span


def shard(
    num_layers: int,
    num_kv_heads: int,
    *,
    tp: int,
    pp: int,
    tp_rank: int,
    pp_rank: int,
    stages: Sequence[int] | None = None,
) -> Shard:
    """Return the layers and KV heads that rank (tp_rank, pp_rank) holds.

    With more ranks than KV heads, rank r holds head `r * num_kv_heads // tp`, as do its neighbours.
    `stages` gives the layers of each pipeline stage where an even split is not wanted.
    Raises `LayoutError`.
    """
    return Shard(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        layers=_stage(num_layers, pp, pp_rank, stages),
        heads=_kv_heads(num_kv_heads, tp, tp_rank),
    )


def query_heads(num_heads: int, num_kv_heads: int, *, tp: int, tp_rank: int) -> Span:
    """Return the query heads of a rank: all that attend to its KV heads.

    Ranks with one KV head in common share its query heads among them. Raises `LayoutError`, also when a rank would
    be left without a query head.
    """
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads:
        raise LayoutError("num_heads", f"a multiple of the {num_kv_heads} KV heads", num_heads)
    group = num_heads // num_kv_heads
    held = _kv_heads(num_kv_heads, tp, tp_rank)
    if tp <= num_kv_heads:
        return Span(held.start * group, held.stop * group)
    first, end = (-(-head * tp // num_kv_heads) for head in (held.start, held.stop))
    own = _even("ranks to a KV head", group, end - first, tp_rank - first)
    return Span(held.start * group + own.start, held.start * group + own.stop)


def _kv_heads(num_kv_heads: int, tp: int, tp_rank: int) -> Span:
    if not 0 <= tp_rank < tp:
        raise LayoutError("tp_rank", f"0 to {tp - 1}", tp_rank)
    if num_kv_heads < tp:
        head = tp_rank * num_kv_heads // tp
        return Span(head, head + 1)
    return _even("tp", num_kv_heads, tp, tp_rank)


def _stage(num_layers: int, pp: int, pp_rank: int, stages: Sequence[int] | None) -> Span:
    if not 0 <= pp_rank < pp:
        raise LayoutError("pp_rank", f"0 to {pp - 1}", pp_rank)
    if stages is None:
        return _even("pp", num_layers, pp, pp_rank)
    if len(stages) != pp or min(stages) < 1 or sum(stages) != num_layers:
        raise LayoutError("stages", f"{pp} counts of at least 1, together {num_layers} layers", list(stages))
    start = sum(stages[:pp_rank])
    return Span(start, start + stages[pp_rank])


def _even(field: str, total: int, parts: int, index: int) -> Span:
    if parts > total:
        raise LayoutError(field, f"at most {total}, so that each has something to hold", parts)
    each, more = divmod(total, parts)
    start = index * each + min(index, more)
    return Span(start, start + each + (index < more))

"""Layouts: what the named ones look like, and what is refused of a hostile peer."""

import pickle
from typing import Any

import msgspec
import pytest

from tandem.kv.layout import (
    BLOCK_MAJOR,
    LAYER_MAJOR,
    Axis,
    Dimension,
    KvLayout,
    LayoutError,
    Shard,
    Span,
    block_major,
    latent,
    layer_major,
    packed,
    token_major,
)

SHARD = Shard(num_layers=6, num_kv_heads=8, layers=Span(2, 5), heads=Span(4, 6))
GEOMETRY = {"blocks": 7, "block_size": 16, "head_dim": 64, "itemsize": 2}
TOKEN_BYTES = 3 * 2 * 2 * 64 * 2  # layers, k and v, heads, dim, itemsize


def strides(layout: KvLayout) -> dict[str, int]:
    return {str(d.axis): d.stride for d in layout.dimensions}


def wire(layout: KvLayout) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.to_builtins(layout)
    return value


def test_block_major_keeps_a_head_of_a_block_together_over_all_layers() -> None:
    layout = block_major(SHARD, **GEOMETRY)
    assert [d.axis for d in layout.dimensions] == list(BLOCK_MAJOR)
    assert strides(layout) == {
        "block": 2 * 3 * 2 * 16 * 128,
        "head": 3 * 2 * 16 * 128,
        "layer": 2 * 16 * 128,
        "kv": 16 * 128,
        "token": 128,
        "dim": 2,
    }


def test_token_major_keeps_the_heads_of_a_token_together() -> None:
    layout = token_major(SHARD, **GEOMETRY)
    assert strides(layout) == {
        "block": 3 * 2 * 16 * 256,
        "layer": 2 * 16 * 256,
        "kv": 16 * 256,
        "token": 256,
        "head": 128,
        "dim": 2,
    }


def test_layer_major_keeps_the_blocks_of_a_layer_together() -> None:
    layout = layer_major(SHARD, **GEOMETRY)
    assert strides(layout)["layer"] == 2 * 7 * 16 * 256
    assert strides(layout)["block"] == 16 * 256


@pytest.mark.parametrize("order", [BLOCK_MAJOR, LAYER_MAJOR])
def test_a_latent_has_one_head_that_is_key_and_value(order: tuple[Axis, ...]) -> None:
    shard = Shard(6, 1, Span(0, 6), Span(0, 1))
    layout = latent(shard, blocks=7, block_size=16, latent_dim=576, itemsize=2, order=order)
    assert layout.size(Axis.KV) == layout.size(Axis.HEAD) == 1
    assert layout.nbytes == 7 * 16 * 6 * 576 * 2


def test_a_latent_of_several_heads_is_refused() -> None:
    with pytest.raises(LayoutError, match="num_kv_heads: expected 1 for a latent, got 8"):
        latent(SHARD, blocks=7, block_size=16, latent_dim=576, itemsize=2)


@pytest.mark.parametrize("make", [block_major, token_major, layer_major])
def test_packed_layouts_fill_their_memory_to_the_byte(make: Any) -> None:
    layout = make(SHARD, **GEOMETRY)
    assert layout.nbytes == 7 * 16 * TOKEN_BYTES


def test_a_layout_of_more_memory_than_any_machine_has_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"size of the memory: expected at most \d+ bytes, got \d+ bytes"):
        block_major(SHARD, blocks=1 << 38, block_size=16, head_dim=64, itemsize=2)


def test_a_layout_says_its_sizes() -> None:
    layout = token_major(SHARD, **GEOMETRY)
    assert (layout.blocks, layout.block_size, layout.head_dim, layout.size(Axis.LAYER)) == (7, 16, 64, 3)
    assert (layout.layers, layout.heads) == (Span(2, 5), Span(4, 6))


@pytest.mark.parametrize("codec", [msgspec.json, msgspec.msgpack])
def test_a_layout_crosses_the_wire_unchanged(codec: Any) -> None:
    layout = layer_major(SHARD, **GEOMETRY)
    assert codec.decode(codec.encode(layout), type=KvLayout) == layout


def test_gaps_between_rows_are_allowed_and_counted() -> None:
    layout = block_major(SHARD, **GEOMETRY)
    padded = widened(layout, Axis.BLOCK, 4096)
    assert padded.nbytes == layout.nbytes + 6 * 4096


def test_the_stride_of_an_axis_with_one_index_does_not_matter() -> None:
    one = packed(BLOCK_MAJOR, Shard(6, 8, Span(2, 5), Span(4, 5)), **GEOMETRY)
    dimensions = [Dimension(d.axis, d.size, 3 if d.axis is Axis.HEAD else d.stride) for d in one.dimensions]
    assert KvLayout(tuple(dimensions), one.itemsize, one.shard).nbytes == one.nbytes


def widened(layout: KvLayout, axis: Axis, more: int) -> KvLayout:
    dimensions = [Dimension(d.axis, d.size, d.stride + more * (d.axis is axis)) for d in layout.dimensions]
    return KvLayout(tuple(dimensions), layout.itemsize, layout.shard)


@pytest.mark.parametrize("axis", ["block", "head", "layer", "kv", "token", "dim"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("stride", -128), ("stride", 0), ("stride", 1), ("stride", 1 << 62), ("size", 0), ("size", -1), ("size", 1 << 62)],
)
def test_sizes_and_strides_that_are_negative_overlap_or_overflow_are_refused(axis: str, key: str, value: int) -> None:
    hostile = wire(block_major(SHARD, **GEOMETRY))
    next(d for d in hostile["dimensions"] if d["axis"] == axis)[key] = value
    with pytest.raises(msgspec.ValidationError, match=rf"(size|stride) of {axis}: expected .*, got -?\d+"):
        msgspec.convert(hostile, KvLayout)


@pytest.mark.parametrize("axis", [a for a in Axis if a is not Axis.DIM])
def test_rows_that_overlap_by_one_byte_are_refused(axis: Axis) -> None:
    layout = block_major(SHARD, **GEOMETRY)
    with pytest.raises(LayoutError, match=f"stride of {axis}: expected at least {layout.stride(axis)} bytes"):
        widened(layout, axis, -1)


def test_elements_with_gaps_between_them_are_refused() -> None:
    with pytest.raises(LayoutError, match="stride of dim: expected 2, the itemsize, got 4"):
        packed_with_dim_stride(4)


def packed_with_dim_stride(stride: int) -> KvLayout:
    layout = block_major(SHARD, **GEOMETRY)
    dimensions = [Dimension(d.axis, d.size, stride if d.axis is Axis.DIM else d.stride * 2) for d in layout.dimensions]
    return KvLayout(tuple(dimensions), layout.itemsize, layout.shard)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"itemsize": 3}, "itemsize: expected 1, 2, 4 or 8 bytes, got 3"),
        ({"itemsize": 4}, "stride of dim"),
        ({"dimensions": []}, "got none"),
        ({"dimensions": [{"axis": "token", "size": 1, "stride": 1}] * 6}, "each of the six axes once"),
        ({"dimensions": [{"axis": "page", "size": 1, "stride": 1}]}, "Invalid enum value 'page'"),
        ({"shard": {"num_layers": 6, "num_kv_heads": 8}}, "missing required field `layers`"),
        ({"owner": "me"}, "unknown field `owner`"),
        ({"itemsize": "2"}, "Expected `int`, got `str`"),
    ],
)
def test_what_is_no_layout_is_refused(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(wire(block_major(SHARD, **GEOMETRY)) | change, KvLayout)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layers": {"start": 2, "stop": 2}}, r"layers: expected .* within \[0, 6\), got \[2, 2\)"),
        ({"layers": {"start": -1, "stop": 2}}, "layers"),
        ({"layers": {"start": 4, "stop": 7}}, r"within \[0, 6\), got \[4, 7\)"),
        ({"heads": {"start": 6, "stop": 4}}, "heads"),
        ({"heads": {"start": 7, "stop": 9}}, r"within \[0, 8\), got \[7, 9\)"),
        ({"num_layers": 1 << 40}, "num_layers"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"layers": {"start": 0, "stop": 4}}, "size of layer: expected 4, as many as the rank holds, got 3"),
        ({"heads": {"start": 0, "stop": 1}}, "size of head: expected 1, as many as the rank holds, got 2"),
    ],
)
def test_ranges_that_lie_outside_or_do_not_match_the_memory_are_refused(
    change: dict[str, object], complaint: str
) -> None:
    hostile = wire(block_major(SHARD, **GEOMETRY))
    hostile["shard"] |= change
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(hostile, KvLayout)


def test_three_parts_to_a_key_and_value_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"size of kv: expected 2 .* or 1 .*, got 3"):
        packed(BLOCK_MAJOR, SHARD, kv=3, **GEOMETRY)


def test_an_order_with_dim_inside_another_axis_is_refused() -> None:
    with pytest.raises(LayoutError, match="dim last, got block, head, layer, kv, dim, token"):
        packed((*BLOCK_MAJOR[:4], Axis.DIM, Axis.TOKEN), SHARD, **GEOMETRY)


def test_an_order_with_blocks_inside_tokens_is_refused() -> None:
    with pytest.raises(LayoutError, match="token within block, got token, block, head"):
        packed((Axis.TOKEN, *(a for a in BLOCK_MAJOR if a is not Axis.TOKEN)), SHARD, **GEOMETRY)


def test_a_refusal_keeps_its_parts_from_process_to_process() -> None:
    refusal = LayoutError("itemsize", 2, 3)
    copy = pickle.loads(pickle.dumps(refusal))
    assert (copy.field, copy.expected, copy.got, str(copy)) == ("itemsize", 2, 3, str(refusal))

"""The pages in which vLLM's CPU kernels keep keys and values, as data, and their way to plain rows and back.

A *page* holds the keys or the values of one block and KV head: `block_size * head_dim` elements in an order that the
kernel likes. *Rows* are the same elements as `[token][dim]`, the order of Tandem's block-major layout. Which order a
kernel uses is in no interface, so `self_test` asks the kernel itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import Tensor


class PageAxis(Enum):
    TOKEN = "token"
    DIM = "dim"


T, D = PageAxis.TOKEN, PageAxis.DIM


@dataclass(frozen=True, slots=True)
class Factor:
    """A part of an axis of a page; `size` 0 stands for what the other parts of the axis leave."""

    axis: PageAxis
    size: int = 0


Order = tuple[Factor, ...]
"""The factors of both axes, outermost in memory first. Of the parts of one axis, the outermost counts most."""


@dataclass(frozen=True, slots=True)
class PageLayout:
    """The orders of the elements in a page of keys and in one of values."""

    name: str
    keys: Order
    values: Order


VEC = PageLayout("vec", (Factor(D), Factor(T)), (Factor(T), Factor(D)))
"""csrc/cpu/cpu_attn_vec.hpp: keys transposed, values plain."""

AMX = PageLayout(
    "amx",
    (Factor(T), Factor(D), Factor(T, 16), Factor(D, 2)),
    (Factor(D), Factor(T), Factor(D, 16), Factor(T, 2)),
)
"""csrc/cpu/cpu_attn_amx.hpp: tiles of 16 with pairs of the axis that is summed over."""

KNOWN_LAYOUTS = (VEC, AMX)


def paired(pages: Tensor, rows: Tensor, order: Order) -> tuple[Tensor, Tensor]:
    """Return views of one shape in which elements at the same place belong together, so that `copy_` converts.

    Args:
        pages: [..., block_size * head_dim] in `order`, the last axis dense.
        rows: [..., block_size, head_dim], the last two axes dense.
    """
    lead, (block_size, head_dim) = rows.shape[:-2], rows.shape[-2:]
    sizes, places = _sizes(order, block_size, head_dim), _rows_first(order)
    split = pages.view(*lead, *sizes).permute(*range(len(lead)), *(len(lead) + place for place in places))
    return split, rows.view(*lead, *(sizes[place] for place in places))


def to_rows(pages: Tensor, order: Order, block_size: int, head_dim: int) -> Tensor:
    """[..., block_size * head_dim] in `order` -> a copy [..., block_size, head_dim]."""
    rows = pages.new_empty(*pages.shape[:-1], block_size, head_dim)
    source, target = paired(pages, rows, order)
    target.copy_(source)
    return rows


def to_pages(rows: Tensor, order: Order) -> Tensor:
    """[..., block_size, head_dim] -> a copy [..., block_size * head_dim] in `order`."""
    pages = rows.new_empty(*rows.shape[:-2], rows.shape[-2] * rows.shape[-1])
    target, source = paired(pages, rows, order)
    target.copy_(source)
    return pages


def fits(layout: PageLayout, block_size: int, head_dim: int) -> bool:
    """Tell whether blocks and heads of these sizes can be laid out so."""
    return all(
        size > 0 and total % size == 0
        for order in (layout.keys, layout.values)
        for axis, total in ((T, block_size), (D, head_dim))
        for size in [_fixed(order, axis)]
    )


def _rows_first(order: Order) -> list[int]:
    """Return the places of the token's factors, then those of the dim's."""
    return [place for axis in (T, D) for place, factor in enumerate(order) if factor.axis is axis]


def _sizes(order: Order, block_size: int, head_dim: int) -> list[int]:
    rest = {T: block_size // _fixed(order, T), D: head_dim // _fixed(order, D)}
    return [factor.size or rest[factor.axis] for factor in order]


def _fixed(order: Order, axis: PageAxis) -> int:
    product = 1
    for factor in order:
        if factor.axis is axis and factor.size:
            product *= factor.size
    return product

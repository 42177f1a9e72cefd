"""The rows of one step as tensors: the new tokens, the slots of their keys and values, the blocks they attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tandem.models.block_table import BlockTable


class ForwardRow(NamedTuple):
    """New tokens of one sequence."""

    tokens: Sequence[int]
    start: int
    """Position of the first new token; the keys and values of all before it are in the blocks."""
    blocks: BlockTable
    """Blocks of the sequence in its order; they cover `end` positions or more."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one new token each and of similar length; their tokens are `first <= i < stop` of the batch."""

    first: int
    stop: int
    blocks: Tensor
    """int64 [rows, blocks of the longest row]; shorter rows are filled up with their own first block."""
    lengths: Tensor
    """int64 [rows]: positions to attend to, the new token included."""
    longest: int
    is_even: bool
    """All rows are as long as the longest."""


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A row of several new tokens, `first <= i < stop` of the batch, after `start` positions of context."""

    first: int
    stop: int
    start: int
    blocks: Tensor
    """int64 [blocks that hold the context and the new tokens]."""

    @property
    def length(self) -> int:
        return self.start + self.stop - self.first


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step for every layer and rank: N tokens of R rows. Made by `build_forward_batch`."""

    token_ids: Tensor
    """int64 [N]: decode rows first, the longest of them leading, then prefill rows in the order given."""
    positions: Tensor
    """int64 [N]."""
    slot_blocks: Tensor
    """int64 [N]: the block that takes a token's key and value."""
    slot_offsets: Tensor
    """int64 [N]: the place within that block."""
    last_tokens: Tensor
    """int64 [R]: index in N of the last token of each row, in the order the rows were given."""
    end: int
    """One more than the highest position."""
    decode: tuple[DecodeGroup, ...]
    prefill: tuple[PrefillRow, ...]

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]


# A group of its own costs a handful of operations a layer; it has to save the gathering of this many positions.
GROUP_SAVES = 1024


def group_by_length(lengths: Sequence[int]) -> list[range]:
    """Split rows, longest first, where padding the rest to the longest of the group would waste much."""
    if not lengths:
        return []
    groups: list[range] = []
    first = 0
    for row, length in enumerate(lengths):
        wasted = (lengths[first] - length) * (len(lengths) - row)
        if 2 * length < lengths[first] and wasted >= GROUP_SAVES:
            groups.append(range(first, row))
            first = row
    groups.append(range(first, len(lengths)))
    return groups


def row_problem(row: ForwardRow, block_size: int) -> str | None:
    """Return why there can be no batch with this row; None if there can."""
    if row.tokens and len(row.blocks) * block_size >= row.end:
        return None
    return (
        f"a row needs tokens and a block for each; got {len(row.tokens)} tokens from position {row.start} on, "
        f"{len(row.blocks)} blocks of {block_size}"
    )


def build_forward_batch(rows: Sequence[ForwardRow], device: torch.device | str, block_size: int) -> ForwardBatch:
    """Make the tensors for `rows`. Raises `ValueError` for a row without tokens or with fewer blocks than it needs."""
    for row in rows:
        if (problem := row_problem(row, block_size)) is not None:
            raise ValueError(problem)
    order = sorted(range(len(rows)), key=lambda r: -rows[r].start if len(rows[r].tokens) == 1 else 1)
    ordered = [rows[r] for r in order]
    positions = _integers([position for row in ordered for position in range(row.start, row.end)], device)
    slot_blocks = [row.blocks.ids[position // block_size] for row in ordered for position in range(row.start, row.end)]
    stops = list(accumulate(len(row.tokens) for row in ordered))
    last_tokens = [0] * len(rows)
    for r, stop in zip(order, stops, strict=True):
        last_tokens[r] = stop - 1
    single = sum(len(row.tokens) == 1 for row in ordered)
    return ForwardBatch(
        token_ids=_integers([token for row in ordered for token in row.tokens], device),
        positions=positions,
        slot_blocks=_integers(slot_blocks, device),
        slot_offsets=positions % block_size,
        last_tokens=_integers(last_tokens, device),
        end=max(row.end for row in ordered),
        decode=_decode_groups(ordered[:single], device, block_size),
        prefill=tuple(
            PrefillRow(stop - len(row.tokens), stop, row.start, _used(row, block_size))
            for row, stop in zip(ordered[single:], stops[single:], strict=True)
        ),
    )


def _decode_groups(rows: list[ForwardRow], device: torch.device | str, block_size: int) -> tuple[DecodeGroup, ...]:
    lengths = [row.end for row in rows]
    groups = []
    for group in group_by_length(lengths):
        longest, shortest = lengths[group.start], lengths[group.stop - 1]
        width = -(-longest // block_size)
        table = torch.empty(len(group), width, dtype=torch.int64, device=device)
        for index, row in enumerate(rows[group.start : group.stop]):
            used = _used(row, block_size)
            table[index, : len(used)] = used
            if len(used) < width:
                table[index, len(used) :] = used[0]
        groups.append(
            DecodeGroup(
                first=group.start,
                stop=group.stop,
                blocks=table,
                lengths=_integers(lengths[group.start : group.stop], device),
                longest=longest,
                is_even=longest == shortest,
            )
        )
    return tuple(groups)


def _used(row: ForwardRow, block_size: int) -> Tensor:
    """Return the blocks up to that of the row's last new token; a row may own more."""
    return row.blocks.first(-(-row.end // block_size))


def _integers(values: object, device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)

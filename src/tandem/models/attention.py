"""Attention over a paged KV cache (PagedAttention; Kwon et al., SOSP 2023).

A decode row gathers its head blocks (`tandem.models.kv_cache`) into one copy and attends to that; a prompt's first
chunk attends to its keys and values as they come. What depends on the step and not on the layer (indices, masks) is
computed once, in `plan`.

The same path serves every device. torch's `varlen_attn` with a block table would spare the copy on CUDA; which block
sizes and strides its kernels take has not been tried.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tandem.models.forward_batch import DecodeGroup, ForwardBatch, PrefillRow
from tandem.models.kv_cache import PagedKvCache
from tandem.models.kv_checksums import ChecksumSlots

# Queries of a chunk attended to at a time. CPU kernels compute what a causal mask hides, so short tiles save up
# to half of the work there; on a GPU a tile only bounds the size of the mask.
CPU_TILE = 64
GPU_TILE = 1024

# From this many gathered positions on, two bfloat16 products are faster on a CPU than its fused kernel.
SPLIT_FROM = 1024


@dataclass(frozen=True, slots=True)
class _DecodePlan:
    group: DecodeGroup
    head_blocks: Tensor
    width: int
    """Gathered positions of a row to attend to: those of the longest row, or all."""
    splits: bool
    mask: Tensor | None
    """[rows, 1, 1, width], additive; None where all rows see all of it."""
    unused: Tensor | None
    """Gathered slots that the row has not written. They are zeroed: whatever lies there, be it NaN, times a
    probability of zero has to be zero."""


@dataclass(frozen=True, slots=True)
class _PrefillPlan:
    row: PrefillRow
    head_blocks: Tensor | None
    """None for a chunk without context."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The indices and masks of one step, the same for every layer of a stage."""

    slots: Tensor
    """int64 [N, 2 * KV heads]: the slots that take the new keys and values."""
    checksums: ChecksumSlots | None
    """The places of their checksums, where those are wanted."""
    decode: tuple[_DecodePlan, ...]
    prefill: tuple[_PrefillPlan, ...]


class PagedAttention:
    """Causal grouped-query attention of `num_heads` query heads over `num_kv_heads` KV heads, as held by a rank."""

    def __init__(
        self, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self._scale = head_dim**-0.5
        self._on_cpu = device.type == "cpu"
        self._splits = self._on_cpu and dtype == torch.bfloat16
        self._mask = _CausalMask(CPU_TILE if self._on_cpu else GPU_TILE, dtype, device)
        self._gathered = torch.empty(0, dtype=dtype, device=device)

    def plan(self, batch: ForwardBatch, cache: PagedKvCache) -> AttentionPlan:
        self._mask.reserve(max((row.length for row in batch.prefill), default=0))
        slots, checksums = (batch.slot_blocks, batch.slot_offsets), None
        if cache.checksums is not None:
            checksums = cache.checksums.slots(*slots, batch.positions)
        return AttentionPlan(
            slots=cache.slot_index(*slots),
            checksums=checksums,
            decode=tuple(self._plan_decode(group, cache) for group in batch.decode),
            prefill=tuple(
                _PrefillPlan(row, cache.head_block_index(row.blocks[None]) if row.start else None)
                for row in batch.prefill
            ),
        )

    def _plan_decode(self, group: DecodeGroup, cache: PagedKvCache) -> _DecodePlan:
        head_blocks = cache.head_block_index(group.blocks)
        gathered = group.blocks.shape[1] * cache.block_size
        splits = self._splits and group.blocks.shape[0] * gathered >= SPLIT_FROM
        # The plain products would copy keys that are cut short.
        width = gathered if splits else group.longest
        if group.is_even and group.longest == width:
            return _DecodePlan(group, head_blocks, width, splits, mask=None, unused=None)
        positions = torch.arange(gathered, device=head_blocks.device)
        lengths = group.lengths[:, None]
        hidden = positions >= lengths  # [rows, gathered]
        # Short rows are filled up with their first block: their own numbers, unless that is the last one too.
        in_last = positions // cache.block_size == (lengths - 1) // cache.block_size
        unused = hidden & (in_last | (lengths < cache.block_size))
        unused = unused[None, :, None, :].expand(2, -1, self.num_kv_heads, -1).flatten().nonzero().squeeze(1)
        mask = torch.zeros(hidden.shape, dtype=self._mask.dtype, device=head_blocks.device)
        mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None, :width]
        return _DecodePlan(group, head_blocks, width, splits, mask, unused)

    def __call__(self, qkv: Tensor, plan: AttentionPlan, cache: PagedKvCache, layer: int) -> Tensor:
        """Store the new keys and values, then attend.

        Args:
            qkv: [N, num_heads + 2 * num_kv_heads, head_dim]; queries and keys are rotated already.
            layer: index among the layers that the rank holds.

        Returns:
            [N, num_heads * head_dim].
        """
        new = qkv[:, self.num_heads :]
        cache.slots[layer].index_put_((plan.slots,), new)
        if cache.checksums is not None and plan.checksums is not None:
            # Here, before the layer's collective, so that all ranks have them when the last one has its token.
            cache.checksums.write(plan.checksums, layer, new)
        parts = [self._decode(qkv, decode, cache.head_blocks[layer]) for decode in plan.decode]
        for prefill in plan.prefill:
            parts += self._prefill(qkv, prefill, cache.head_blocks[layer])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(self, qkv: Tensor, plan: _DecodePlan, head_blocks: Tensor) -> Tensor:
        group = plan.group
        rows, heads = group.stop - group.first, self.num_kv_heads
        gathered = self._gather(head_blocks, plan.head_blocks).view(-1, self.head_dim)
        if plan.unused is not None:
            gathered.index_fill_(0, plan.unused, 0.0)
        keys, values = gathered.view(2, rows, heads, -1, self.head_dim)[..., : plan.width, :]
        queries = qkv[group.first : group.stop, : self.num_heads].view(rows, heads, -1, self.head_dim)
        if plan.splits:
            out = _attend_split(queries, keys, values, plan.mask, self._scale)
        else:
            out = scaled_dot_product_attention(queries, keys, values, attn_mask=plan.mask, scale=self._scale)
        return out.reshape(rows, -1)

    def _gather(self, head_blocks: Tensor, index: Tensor) -> Tensor:
        """Copy head blocks together, into memory that the next call takes again: the kernel would have to map and
        clear fresh memory each time."""
        shape = (index.shape[0], head_blocks.shape[1])
        if self._gathered.numel() < shape[0] * shape[1]:
            self._gathered = head_blocks.new_empty(shape[0] * shape[1])
        out = self._gathered[: shape[0] * shape[1]].view(shape)
        return torch.index_select(head_blocks, 0, index, out=out)

    def _prefill(self, qkv: Tensor, plan: _PrefillPlan, head_blocks: Tensor) -> list[Tensor]:
        row, heads = plan.row, self.num_kv_heads
        if plan.head_blocks is None:
            new = qkv[row.first : row.stop, self.num_heads :].transpose(0, 1)  # [2 * heads, n, head_dim]
            keys, values = new[None, :heads], new[None, heads:]
        else:
            gathered = self._gather(head_blocks, plan.head_blocks).view(2, 1, heads, -1, self.head_dim)
            keys, values = gathered[0], gathered[1]
        if not self._on_cpu:
            keys, values = (t.repeat_interleave(self.num_heads // heads, 1) for t in (keys, values))
        parts = []
        for first in range(row.first, row.stop, self._mask.tile):
            stop = min(first + self._mask.tile, row.stop)
            end = row.start + stop - row.first
            out = scaled_dot_product_attention(
                qkv[None, first:stop, : self.num_heads].transpose(1, 2),
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=self._mask.last(stop - first, end),
                scale=self._scale,
                enable_gqa=self._on_cpu,
            )  # [1, num_heads, tile, head_dim]
            parts.append(out[0].transpose(0, 1).flatten(1))
        return parts


class _CausalMask:
    """An additive mask for the last queries of a sequence, cut from one matrix that grows by doubling."""

    def __init__(self, tile: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tile = tile
        self.dtype = dtype
        self._matrix = torch.empty(tile, 0, dtype=dtype, device=device)

    def reserve(self, keys: int) -> None:
        """Prepare for sequences of up to `keys` positions."""
        width = self._matrix.shape[1]
        if keys + self.tile <= width:
            return
        width = max(1024, 1 << (keys + self.tile - 1).bit_length())
        matrix = torch.full((self.tile, width), float("-inf"), dtype=self.dtype, device=self._matrix.device)
        self._matrix = matrix.triu_(width - self.tile + 1)

    def last(self, queries: int, keys: int) -> Tensor:
        """[queries, keys] for queries at the last positions of `keys`, queries <= tile."""
        end = self._matrix.shape[1] - self.tile + queries
        return self._matrix[:queries, end - keys : end]


def _attend_split(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend by bfloat16 products with scores as exact as float32 ones.

    The first product rounds the scores to bfloat16; the second adds up the same products in float32 again, starting
    from minus the rounded scores, and so returns what the rounding lost.

    Args:
        queries: [rows, heads, G, head_dim].
        keys, values: [rows, heads, T, head_dim].
        mask: [rows, 1, 1, T] or None.
    """
    shape = queries.shape
    flat = queries.flatten(0, 1)
    transposed = keys.flatten(0, 1).transpose(1, 2)
    rounded = torch.bmm(flat, transposed)
    lost = torch.baddbmm(rounded, flat, transposed, beta=-1)
    scores = rounded.float().add_(lost).mul_(scale)  # [rows * heads, G, T]
    if mask is not None:
        scores.view(*shape[:3], -1).add_(mask)
    probabilities = torch.softmax(scores, dim=-1).to(values.dtype)
    return torch.bmm(probabilities, values.flatten(0, 1)).view(shape)

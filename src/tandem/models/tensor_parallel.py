"""Layers whose weights are split over the tensor-parallel ranks, after Megatron-LM (Shoeybi et al., 2019).

A column-parallel layer splits the outputs and needs no communication; a row-parallel one that follows it splits the
inputs in the same way, and one all-reduce adds up what the ranks computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from tandem.models.layers import Linear
from tandem.models.rank_slice import RankSlice, WeightSlice


class Projection(NamedTuple):
    """A linear layer of the checkpoint and the part of its split dimension that a rank holds."""

    name: str
    """In the checkpoint, without `.weight` or `.bias`."""
    size: int
    """Outputs (column-parallel) or inputs (row-parallel), over all ranks."""
    own: range
    """The rank's part of them."""


class ColumnParallelLinear(Linear):
    """Projections of one input, stacked; each rank computes its own part of the outputs of each.

    [..., num_inputs] -> [..., the rank's outputs of the first projection, of the second, ...].
    """

    def __init__(
        self, rank: RankSlice, num_inputs: int, projections: Sequence[Projection], has_bias: bool = False
    ) -> None:
        num_outputs = sum(len(projection.own) for projection in projections)
        super().__init__(rank.tensor(num_outputs, num_inputs), rank.tensor(num_outputs) if has_bias else None)
        self._projections = projections

    def weight_slices(self) -> Iterator[WeightSlice]:
        start, num_inputs = 0, self.weight.shape[1]
        for name, size, own in self._projections:
            rows, part = slice(start, start + len(own)), (slice(own.start, own.stop),)
            yield WeightSlice(f"{name}.weight", (size, num_inputs), self.weight[rows], part)
            if self.bias is not None:
                yield WeightSlice(f"{name}.bias", (size,), self.bias[rows], part)
            start = rows.stop


class RowParallelLinear(Linear):
    """A projection whose inputs are split over the ranks; its outputs are summed over them.

    [..., the rank's inputs] -> [..., num_outputs], equal on all ranks.
    """

    def __init__(self, rank: RankSlice, num_outputs: int, projection: Projection, has_bias: bool = False) -> None:
        # Rank 0 alone adds the bias, which would otherwise count once for each rank.
        bias = rank.tensor(num_outputs) if has_bias and rank.position.tp_rank == 0 else None
        super().__init__(rank.tensor(num_outputs, len(projection.own)), bias)
        self._projection = projection
        self._collectives = rank.collectives

    def __call__(self, x: Tensor) -> Tensor:
        return self._collectives.all_reduce(super().__call__(x))

    def weight_slices(self) -> Iterator[WeightSlice]:
        name, size, own = self._projection
        num_outputs = self.weight.shape[0]
        part = (slice(None), slice(own.start, own.stop))
        yield WeightSlice(f"{name}.weight", (num_outputs, size), self.weight, part)
        if self.bias is not None:
            yield WeightSlice(f"{name}.bias", (num_outputs,), self.bias)


class VocabParallelEmbedding:
    """Token embeddings with the vocabulary split over the ranks: int64 [N] -> [N, hidden_size], equal on all ranks."""

    def __init__(self, rank: RankSlice) -> None:
        self._rank = rank
        self.weight = _vocab_weight(rank)

    def __call__(self, token_ids: Tensor) -> Tensor:
        rank = self._rank
        if rank.position.tp_size == 1:
            return F.embedding(token_ids, self.weight)
        is_own = (token_ids >= rank.vocab.start) & (token_ids < rank.vocab.stop)
        own = F.embedding((token_ids - rank.vocab.start) * is_own, self.weight)
        return rank.collectives.all_reduce(own.masked_fill_(~is_own[:, None], 0))

    def weight_slices(self) -> Iterator[WeightSlice]:
        yield _vocab_slice(self._rank, "model.embed_tokens.weight", self.weight)


class VocabParallelHead(Linear):
    """The projection to the vocabulary, which is split over the ranks.

    Args:
        tied: the embedding, if its weight is also the head's. It keeps the plain order of the weight when the head
            packs its own copy: memory for speed.
    """

    def __init__(self, rank: RankSlice, tied: VocabParallelEmbedding | None) -> None:
        super().__init__(tied.weight if tied is not None else _vocab_weight(rank))
        self._rank = rank
        self._is_tied = tied is not None

    def logits(self, hidden: Tensor) -> Tensor | None:
        """[R, hidden_size] -> float32 [R, vocab_size] on rank 0, None on the others."""
        logits = self._rank.collectives.gather(self(hidden), dim=-1)
        return None if logits is None else logits[:, : self._rank.config.vocab_size].float()

    def weight_slices(self) -> Iterator[WeightSlice]:
        if not self._is_tied:
            yield _vocab_slice(self._rank, "lm_head.weight", self.weight)


def _vocab_weight(rank: RankSlice) -> Tensor:
    """[vocab_rows, hidden_size]; zero where a row lies beyond the vocabulary."""
    weight = rank.tensor(rank.vocab_rows, rank.config.hidden_size)
    weight[len(rank.vocab) :].zero_()
    return weight


def _vocab_slice(rank: RankSlice, name: str, weight: Tensor) -> WeightSlice:
    shape = (rank.config.vocab_size, rank.config.hidden_size)
    return WeightSlice(name, shape, weight[: len(rank.vocab)], (slice(rank.vocab.start, rank.vocab.stop),))

"""One pipeline stage of a decoder-only transformer, as computed by one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from tandem.models.attention import PagedAttention, PagedKvCache
from tandem.models.forward_batch import ForwardBatch
from tandem.models.kv_size import kv_shape
from tandem.models.layers import Linear, rms_norm, rotate, swiglu
from tandem.models.model_config import ModelConfig
from tandem.models.parallel import Collectives, RankPosition
from tandem.models.rank_slice import RankSlice, WeightSlice
from tandem.models.rope import RotaryTable


class Decoder:
    """The layers of one stage; the embedding on the first stage, final norm and head on the last.

    Weights are empty until `tandem.models.loader` fills them; for a loaded one see `load_decoder`.
    """

    def __init__(
        self,
        config: ModelConfig,
        shard: RankPosition,
        collectives: Collectives,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        stage = self.stage = RankSlice(config, shard, collectives, dtype, torch.device(device))
        self.config = config
        self.shard = shard
        needs_embedding = shard.is_first_stage or (shard.is_last_stage and config.tie_word_embeddings)
        self._embedding = _Embedding(stage) if needs_embedding else None
        self._layers = [_Layer(stage, index) for index in stage.layers]
        self._head = _Head(stage, self._embedding) if shard.is_last_stage else None
        self._attention = PagedAttention(
            len(stage.query_heads), len(stage.kv_heads), config.head_dim, dtype, stage.device
        )
        self._rotary = RotaryTable(config.rope, config.head_dim, dtype, stage.device)
        self._kv: PagedKvCache | None = None

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Computes this stage for the batch and stores its keys and values.

        Args:
            kv: as `kv_shape` has it, contiguous, of this stage's dtype, holding finite numbers, such as zeros.
            hidden: [N, hidden_size] from the stage before; None on the first.

        Returns:
            [N, hidden_size] for the next stage or for `logits`; equal on all tensor-parallel ranks.
        """
        if hidden is None:
            if self._embedding is None:
                raise ValueError("hidden states of the stage before are needed on every stage but the first")
            hidden = self._embedding(batch.token_ids)
        pages = self._pages(kv)
        plan = self._attention.plan(batch, pages)
        cos, sin = self._rotary.at(batch.positions, batch.end)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(hidden, cos, sin)
            hidden = layer.finish(hidden, self._attention(qkv, plan, pages, index))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor | None:
        """The last stage's logits, float32 [R, vocab_size], of `hidden[rows]`; None on tensor-parallel ranks
        other than 0, all of which must call it.

        Args:
            hidden: [N, hidden_size] from `forward`.
            rows: int64 [R], for the next token of each row `batch.last_tokens`.
        """
        if self._head is None:
            raise ValueError("only the last stage has logits")
        return self._head(hidden.index_select(0, rows))

    def pieces(self) -> Iterator[WeightSlice]:
        """What of the checkpoint goes where."""
        if self._embedding is not None:
            yield from self._embedding.pieces()
        for layer in self._layers:
            yield from layer.pieces()
        if self._head is not None:
            yield from self._head.pieces()

    def pack(self) -> None:
        """Brings the loaded weights into the order that the device computes fastest with."""
        for layer in self._layers:
            layer.pack()
        if self._head is not None:
            self._head.pack()

    def _pages(self, kv: Tensor) -> PagedKvCache:
        if self._kv is None or self._kv.kv is not kv:
            expected = kv_shape(self.config, self.shard, kv.shape[0], kv.shape[-2])
            if tuple(kv.shape) != expected or kv.dtype != self.stage.dtype:
                raise ValueError(f"kv must be {expected} {self.stage.dtype}; got {tuple(kv.shape)} {kv.dtype}")
            self._kv = PagedKvCache(kv)
        return self._kv


class _Layer:
    """Attention and MLP, each after a norm and around a residual. One product makes queries, keys and values,
    one makes gates and ups."""

    def __init__(self, stage: RankSlice, index: int) -> None:
        config = self._config = stage.config
        self._stage = stage
        self._prefix = f"model.layers.{index}."
        self._num_queries, self._num_kv = len(stage.query_heads), len(stage.kv_heads)
        heads = self._num_queries + 2 * self._num_kv
        is_first = stage.shard.tp_rank == 0  # adds the biases of what is summed over the ranks
        self._input_norm = stage.tensor(config.hidden_size)
        self._qkv = stage.linear(heads * config.head_dim, config.hidden_size, config.qkv_bias)
        self._qk_norm = stage.tensor(self._num_queries + self._num_kv, config.head_dim) if config.qk_norm else None
        self._output = stage.linear(
            config.hidden_size, self._num_queries * config.head_dim, config.output_bias and is_first
        )
        self._mlp_norm = stage.tensor(config.hidden_size)
        self._gate_up = stage.linear(2 * len(stage.intermediate), config.hidden_size, config.mlp_bias)
        self._down = stage.linear(config.hidden_size, len(stage.intermediate), config.mlp_bias and is_first)

    def qkv(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[N, hidden_size] -> [N, query heads + 2 * KV heads, head_dim], queries and keys rotated."""
        eps = self._config.rms_norm_eps
        qkv = self._qkv(rms_norm(hidden, self._input_norm, eps))
        qkv = qkv.view(hidden.shape[0], -1, self._config.head_dim)
        rotated = qkv[:, : self._num_queries + self._num_kv]
        if self._qk_norm is None:
            rotate(rotated, cos, sin, out=rotated)
        else:
            rotate(rms_norm(rotated, None, eps).mul_(self._qk_norm), cos, sin, out=rotated)
        return qkv

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """All after the attention: [N, hidden_size] and [N, query heads * head_dim] -> [N, hidden_size]."""
        hidden = hidden + self._stage.sum(self._output(attended))
        gate_up = self._gate_up(rms_norm(hidden, self._mlp_norm, self._config.rms_norm_eps))
        return hidden + self._stage.sum(self._down(swiglu(gate_up)))

    def pack(self) -> None:
        for linear in (self._qkv, self._output, self._gate_up, self._down):
            linear.pack()

    def pieces(self) -> Iterator[WeightSlice]:
        config, hidden = self._config, self._config.hidden_size
        yield WeightSlice(f"{self._prefix}input_layernorm.weight", (hidden,), self._input_norm)
        yield WeightSlice(f"{self._prefix}post_attention_layernorm.weight", (hidden,), self._mlp_norm)
        if self._qk_norm is not None:
            queries, keys = self._qk_norm[: self._num_queries], self._qk_norm[self._num_queries :]
            yield WeightSlice(f"{self._prefix}self_attn.q_norm.weight", (config.head_dim,), queries)
            yield WeightSlice(f"{self._prefix}self_attn.k_norm.weight", (config.head_dim,), keys)
        queries_of, keys_of = self._stage.query_heads, self._stage.kv_heads
        yield from self._column_split(
            self._qkv,
            [
                ("self_attn.q_proj", config.num_heads * config.head_dim, self._stage.head_rows(queries_of)),
                ("self_attn.k_proj", config.num_kv_heads * config.head_dim, self._stage.head_rows(keys_of)),
                ("self_attn.v_proj", config.num_kv_heads * config.head_dim, self._stage.head_rows(keys_of)),
            ],
        )
        own = slice(self._stage.intermediate.start, self._stage.intermediate.stop)
        yield from self._column_split(
            self._gate_up,
            [("mlp.gate_proj", config.intermediate_size, own), ("mlp.up_proj", config.intermediate_size, own)],
        )
        query_columns = self._stage.head_rows(queries_of)
        yield from self._row_split(self._output, "self_attn.o_proj", config.num_heads * config.head_dim, query_columns)
        yield from self._row_split(self._down, "mlp.down_proj", config.intermediate_size, own)

    def _column_split(self, linear: Linear, parts: list[tuple[str, int, slice]]) -> Iterator[WeightSlice]:
        """Several projections of the same input, stacked: (name, outputs of the whole, outputs of this rank)."""
        assert linear.weight is not None
        stops = list(accumulate(own.stop - own.start for _, _, own in parts))
        for (name, total, own), stop in zip(parts, stops, strict=True):
            rows = slice(stop - (own.stop - own.start), stop)
            shape = (total, self._config.hidden_size)
            yield WeightSlice(f"{self._prefix}{name}.weight", shape, linear.weight[rows], (own,))
            if linear.bias is not None:
                yield WeightSlice(f"{self._prefix}{name}.bias", (total,), linear.bias[rows], (own,))

    def _row_split(self, linear: Linear, name: str, total: int, own: slice) -> Iterator[WeightSlice]:
        """A projection of an input that is split over the ranks."""
        assert linear.weight is not None
        shape = (self._config.hidden_size, total)
        yield WeightSlice(f"{self._prefix}{name}.weight", shape, linear.weight, (slice(None), own))
        if linear.bias is not None:
            yield WeightSlice(f"{self._prefix}{name}.bias", (shape[0],), linear.bias)


class _Embedding:
    """Token embeddings, the vocabulary split over the ranks."""

    def __init__(self, stage: RankSlice) -> None:
        self._stage = stage
        self.weight = stage.tensor(stage.vocab_rows, stage.config.hidden_size)

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [N] -> [N, hidden_size]."""
        stage = self._stage
        if stage.shard.tp_size == 1:
            return F.embedding(token_ids, self.weight)
        is_own = (token_ids >= stage.vocab.start) & (token_ids < stage.vocab.stop)
        own = F.embedding((token_ids - stage.vocab.start) * is_own, self.weight)
        return stage.sum(own.masked_fill_(~is_own[:, None], 0))

    def pieces(self) -> Iterator[WeightSlice]:
        yield _vocab_piece("model.embed_tokens.weight", self._stage, self.weight)


class _Head:
    """The final norm and the projection to the vocabulary, which is split over the ranks."""

    def __init__(self, stage: RankSlice, embedding: _Embedding | None) -> None:
        self._stage = stage
        self._norm = stage.tensor(stage.config.hidden_size)
        self._is_tied = stage.config.tie_word_embeddings
        if self._is_tied and embedding is not None:
            self._linear = Linear.of(embedding.weight)
        else:
            self._linear = stage.linear(stage.vocab_rows, stage.config.hidden_size)

    def __call__(self, hidden: Tensor) -> Tensor | None:
        """[R, hidden_size] -> float32 [R, vocab_size] on rank 0, None on the others."""
        stage = self._stage
        logits: Tensor | None = self._linear(rms_norm(hidden, self._norm, stage.config.rms_norm_eps))
        if stage.shard.tp_size > 1 and logits is not None:
            logits = stage.collectives.gather(logits, dim=-1)
        return None if logits is None else logits[:, : stage.config.vocab_size].float()

    def pack(self) -> None:
        # A tied weight stays in its plain order too, for the embedding: memory for speed.
        self._linear.pack()

    def pieces(self) -> Iterator[WeightSlice]:
        yield WeightSlice("model.norm.weight", (self._stage.config.hidden_size,), self._norm)
        if not self._is_tied:
            assert self._linear.weight is not None
            yield _vocab_piece("lm_head.weight", self._stage, self._linear.weight)


def _vocab_piece(name: str, stage: RankSlice, weight: Tensor) -> WeightSlice:
    weight[len(stage.vocab) :].zero_()
    own = slice(stage.vocab.start, stage.vocab.stop)
    shape = (stage.config.vocab_size, stage.config.hidden_size)
    return WeightSlice(name, shape, weight[: len(stage.vocab)], (own,))

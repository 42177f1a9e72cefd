"""One pipeline stage of a decoder-only transformer, as computed by one tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tandem.models.attention import PagedAttention
from tandem.models.forward_batch import ForwardBatch
from tandem.models.kv_cache import PagedKvCache
from tandem.models.layers import rms_norm, rotate, swiglu
from tandem.models.rank_slice import RankSlice, WeightSlice
from tandem.models.rope import RotaryTable
from tandem.models.tensor_parallel import (
    ColumnParallelLinear,
    Projection,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
)


class Decoder:
    """The layers of one stage, with the embedding on the first stage and the final norm and head on the last.

    Weights are empty until `tandem.models.loader` fills them; `load_decoder` returns a loaded one.
    """

    def __init__(self, rank: RankSlice) -> None:
        self._rank = rank
        config, position = rank.config, rank.position
        self.config = config
        tied = config.tie_word_embeddings
        needs_embedding = position.is_first_stage or (position.is_last_stage and tied)
        self._embedding = VocabParallelEmbedding(rank) if needs_embedding else None
        self._layers = [_Layer(rank, index) for index in rank.layers]
        self._norm = rank.tensor(config.hidden_size) if position.is_last_stage else None
        self._head = VocabParallelHead(rank, self._embedding if tied else None) if position.is_last_stage else None
        self._attention = PagedAttention(
            len(rank.query_heads), len(rank.kv_heads), config.head_dim, rank.dtype, rank.device
        )
        self._rotary = RotaryTable(config.rope, config.head_dim, rank.dtype, rank.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: PagedKvCache, hidden: Tensor | None = None) -> Tensor:
        """Compute this stage for the batch and store its keys and values.

        Args:
            cache: of this rank's layout and dtype.
            hidden: [N, hidden_size] from the stage before; None on the first.

        Returns:
            [N, hidden_size] for the next stage or for `logits`; equal on all tensor-parallel ranks.
        """
        held, expected = (cache.layout.shard, cache.kv.dtype), (self._rank.kv_shard, self._rank.dtype)
        if held != expected:
            raise ValueError(f"the KV cache must hold {expected}; got {held}")
        if hidden is None:
            if self._embedding is None:
                raise ValueError("hidden states of the stage before are needed on every stage but the first")
            hidden = self._embedding(batch.token_ids)
        plan = self._attention.plan(batch, cache)
        cos, sin = self._rotary.at(batch.positions, batch.end)
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(hidden, cos, sin)
            hidden = layer.finish(hidden, self._attention(qkv, plan, cache, index))
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor, rows: Tensor) -> Tensor | None:
        """Compute the last stage's logits, float32 [R, vocab_size], of `hidden[rows]`; None on tensor-parallel ranks
        other than 0, all of which must call it.

        Args:
            hidden: [N, hidden_size] from `forward`.
            rows: int64 [R], for the next token of each row `batch.last_tokens`.
        """
        if self._head is None:
            raise ValueError("only the last stage has logits")
        return self._head.logits(rms_norm(hidden.index_select(0, rows), self._norm, self.config.rms_norm_eps))

    def weight_slices(self) -> Iterator[WeightSlice]:
        """Yield the parts of the checkpoint that this rank loads."""
        if self._embedding is not None:
            yield from self._embedding.weight_slices()
        for layer in self._layers:
            yield from layer.weight_slices()
        if self._norm is not None:
            yield WeightSlice("model.norm.weight", (self.config.hidden_size,), self._norm)
        if self._head is not None:
            yield from self._head.weight_slices()

    def pack(self) -> None:
        """Bring the loaded weights into the order that the device computes fastest with."""
        for linear in [linear for layer in self._layers for linear in layer.linears]:
            linear.pack()
        if self._head is not None:
            self._head.pack()


class _Layer:
    """Attention and MLP, each after a norm and around a residual. One product makes queries, keys and values,
    one makes gates and ups."""

    def __init__(self, rank: RankSlice, index: int) -> None:
        config = self._config = rank.config
        prefix = self._prefix = f"model.layers.{index}."
        hidden, dim = config.hidden_size, config.head_dim

        def heads(name: str, total: int, own: range) -> Projection:
            return Projection(f"{prefix}self_attn.{name}", total * dim, range(own.start * dim, own.stop * dim))

        def intermediate(name: str) -> Projection:
            return Projection(f"{prefix}mlp.{name}", config.intermediate_size, rank.intermediate)

        queries = heads("q_proj", config.num_heads, rank.query_heads)
        keys, values = (heads(name, config.num_kv_heads, rank.kv_heads) for name in ("k_proj", "v_proj"))
        attended = heads("o_proj", config.num_heads, rank.query_heads)
        self._num_queries, self._num_kv = len(rank.query_heads), len(rank.kv_heads)
        self._input_norm = rank.tensor(hidden)
        self._qkv = ColumnParallelLinear(rank, hidden, [queries, keys, values], config.qkv_bias)
        self._qk_norm = rank.tensor(self._num_queries + self._num_kv, dim) if config.qk_norm else None
        self._output = RowParallelLinear(rank, hidden, attended, config.output_bias)
        self._mlp_norm = rank.tensor(hidden)
        gate_up = [intermediate("gate_proj"), intermediate("up_proj")]
        self._gate_up = ColumnParallelLinear(rank, hidden, gate_up, config.mlp_bias)
        self._down = RowParallelLinear(rank, hidden, intermediate("down_proj"), config.mlp_bias)
        self.linears = (self._qkv, self._output, self._gate_up, self._down)

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
        """Compute all after the attention: [N, hidden_size], [N, query heads * head_dim] -> [N, hidden_size]."""
        hidden = hidden + self._output(attended)
        gate_up = self._gate_up(rms_norm(hidden, self._mlp_norm, self._config.rms_norm_eps))
        return hidden + self._down(swiglu(gate_up))

    def weight_slices(self) -> Iterator[WeightSlice]:
        hidden, dim = (self._config.hidden_size,), (self._config.head_dim,)
        yield WeightSlice(f"{self._prefix}input_layernorm.weight", hidden, self._input_norm)
        yield WeightSlice(f"{self._prefix}post_attention_layernorm.weight", hidden, self._mlp_norm)
        if self._qk_norm is not None:
            queries, keys = self._qk_norm[: self._num_queries], self._qk_norm[self._num_queries :]
            yield WeightSlice(f"{self._prefix}self_attn.q_norm.weight", dim, queries)
            yield WeightSlice(f"{self._prefix}self_attn.k_norm.weight", dim, keys)
        for linear in self.linears:
            yield from linear.weight_slices()

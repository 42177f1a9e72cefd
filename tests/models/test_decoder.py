from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tandem.kv.layout import Span
from tandem.models.block_table import BlockTable
from tandem.models.forward_batch import ForwardRow, build_forward_batch
from tandem.models.kv_cache import PagedKvCache
from tests.models.conftest import Folder, ReferenceGreedy, ReferenceLogits
from tests.models.harness import BLOCK_SIZE, Engine, random_tokens, shuffled_blocks

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EXACT: dict[str, Any] = dict(atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(
    folder: Folder, reference_logits: ReferenceLogits, reference_greedy: ReferenceGreedy, family: str, tied: bool
) -> None:
    path = folder(family, tied=tied)
    prompt = random_tokens(150)
    engine = Engine(path)
    torch.testing.assert_close(engine.logits(prompt), reference_logits(path, prompt), **EXACT)
    assert engine.greedy(prompt[:23], 24) == reference_greedy(path, prompt[:23], 24)


@pytest.mark.parametrize("rope", ["llama3", "linear"])
def test_stretched_positions_are_those_of_transformers(
    folder: Folder, reference_logits: ReferenceLogits, tmp_path: Path, rope: str
) -> None:
    scaling = {
        "llama3": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "linear": {"type": "linear", "factor": 3.0},
    }[rope]
    path = _changed_config(folder("llama"), tmp_path, rope_scaling=scaling, rope_theta=5e5)
    prompt = random_tokens(200)
    torch.testing.assert_close(Engine(path).logits(prompt), reference_logits(path, prompt), **EXACT)


def test_biases_of_attention_and_mlp_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=70,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).train(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(tmp_path, max_shard_size="40KB")  # as transformers 5 writes it, over several files
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    prompt = random_tokens(40)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0]
    torch.testing.assert_close(Engine(tmp_path).logits(prompt), expected, **EXACT)
    torch.testing.assert_close(Engine(tmp_path, tp=3).logits(prompt), expected, **EXACT)


@pytest.mark.parametrize("chunk", [1, 3, 4, 17, 64, 70])
def test_a_prompt_in_chunks_gives_what_it_gives_in_one(folder: Folder, chunk: int) -> None:
    path = folder("qwen3")
    prompt = random_tokens(150)
    whole, chunked = Engine(path), Engine(path)
    torch.testing.assert_close(chunked.logits(prompt, chunk), whole.logits(prompt), **EXACT)
    written = torch.tensor(shuffled_blocks(1)[0][: 150 // BLOCK_SIZE])
    torch.testing.assert_close(chunked.kv[0][written], whole.kv[0][written], **EXACT)


def test_rows_of_every_kind_in_one_step_give_what_each_gives_alone(folder: Folder) -> None:
    path = folder("qwen2")
    engine, alone = Engine(path), Engine(path)
    prompts = [random_tokens(n, seed=n) for n in (90, 9, 41, 3, 1, 66, 5)]
    computed = (80, 8, 40, 2, 0, 2, 0)
    blocks = shuffled_blocks(len(prompts) + 1)
    for prompt, start, own in zip(prompts, computed, blocks, strict=False):
        if start:
            engine.step([(prompt[:start], 0, own)])
    rows = [(p[s:], s, own) for p, s, own in zip(prompts, computed, blocks, strict=False)]
    assert {len(new) == 1 for new, _, _ in rows} == {True, False}
    mixed = engine.step(rows)
    for prompt, logits in zip(prompts, mixed, strict=True):
        torch.testing.assert_close(logits, alone.logits(prompt)[-1], **EXACT)


def test_what_a_block_held_before_does_not_matter_to_rows_decoded_together(folder: Folder) -> None:
    engine = Engine(folder("llama"))
    blocks = shuffled_blocks(3)
    prompts = [random_tokens(n, seed=n) for n in (30, 10, 2)]
    for prompt, own in zip(prompts, blocks, strict=True):
        engine.step([(prompt[:-1], 0, own)])
    rows = [(p[-1:], len(p) - 1, own) for p, own in zip(prompts, blocks, strict=True)]
    assert any(kv.isnan().any() for kv in engine.kv)
    assert engine.step(rows).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_half_precision_stays_near_float32(
    folder: Folder, reference_logits: ReferenceLogits, family: str, dtype: torch.dtype
) -> None:
    path = folder(family)
    prompt = random_tokens(120)
    logits = Engine(path, dtype=dtype).logits(prompt)
    assert logits.dtype == torch.float32
    expected = reference_logits(path, prompt)
    assert (logits - expected).abs().max() < (0.15 if dtype == torch.bfloat16 else 0.03)


def test_many_long_rows_in_bfloat16_decode_as_they_do_alone(folder: Folder, reference_logits: ReferenceLogits) -> None:
    path = folder("qwen3")
    engine = Engine(path, dtype=torch.bfloat16, block_size=16)
    blocks = shuffled_blocks(4)
    prompts = [random_tokens(n, seed=n) for n in (300, 290, 260, 300)]
    for prompt, own in zip(prompts, blocks, strict=True):
        engine.step([(prompt[:-1], 0, own)])
    rows = [(p[-1:], len(p) - 1, own) for p, own in zip(prompts, blocks, strict=True)]
    for prompt, logits in zip(prompts, engine.step(rows), strict=True):
        assert (logits - reference_logits(path, prompt)[-1]).abs().max() < 0.15


def test_packed_weights_give_what_plain_ones_give(folder: Folder, reference_logits: ReferenceLogits) -> None:
    path = folder("qwen3", hidden=512, intermediate=1024, dtype="bfloat16")
    prompt = random_tokens(40)
    for dtype, bound in ((torch.bfloat16, 0.2), (torch.float32, 1e-4)):
        logits = Engine(path, dtype=dtype).logits(prompt, chunk=39)
        assert (logits - reference_logits(path, prompt)).abs().max() < bound


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("heads", [(6, 6), (4, 2), (12, 3)])
def test_tensor_parallel_ranks_give_what_one_gives(folder: Folder, heads: tuple[int, int], tp: int) -> None:
    path = folder("qwen3", heads=heads[0], kv_heads=heads[1], tied=heads == (4, 2))
    prompt = random_tokens(40)
    expected = Engine(path).logits(prompt)
    torch.testing.assert_close(Engine(path, tp=tp).logits(prompt, chunk=39), expected, **EXACT)


@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (1, 3), (2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages_of_uneven_size_give_what_one_gives(folder: Folder, tp: int, pp: int, tied: bool) -> None:
    path = folder("llama", layers=5, tied=tied)
    prompt = random_tokens(40)
    expected = Engine(path).logits(prompt)
    split = Engine(path, tp=tp, pp=pp)
    torch.testing.assert_close(split.logits(prompt, chunk=30), expected, **EXACT)
    assert sorted({kv.shape[2] for kv in split.kv}) == ([2, 3] if pp == 2 else [1, 2])


def test_a_stage_refuses_the_memory_of_other_layers_heads_or_another_dtype(folder: Folder) -> None:
    decoder, cache = Engine(folder("llama"), dtype=torch.float16).stages[0][0]
    batch = build_forward_batch([ForwardRow([1], 0, BlockTable([0]))], "cpu", BLOCK_SIZE)
    shard = cache.layout.shard
    others = [
        PagedKvCache(cache.kv.bfloat16(), cache.layout),
        *(
            PagedKvCache(cache.kv, msgspec.structs.replace(cache.layout, shard=other))
            for other in (
                msgspec.structs.replace(shard, num_layers=3, layers=Span(1, 3)),
                msgspec.structs.replace(shard, num_kv_heads=4, heads=Span(2, 4)),
            )
        ),
    ]
    for other in others:
        with pytest.raises(ValueError, match="the KV cache must hold"):
            decoder.forward(batch, other)


def _changed_config(source: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target

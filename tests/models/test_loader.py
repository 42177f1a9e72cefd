from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tandem.checkpoint.weight_files import INDEX, weight_files
from tandem.errors import ModelError
from tandem.models.collectives import SoloCollectives
from tandem.models.decoder import Decoder
from tandem.models.loader import load_decoder
from tandem.models.model_config import load_config
from tandem.models.rank_position import RankPosition
from tandem.models.rank_slice import RankSlice, WeightSlice
from tests.models.conftest import Folder
from tests.models.harness import Engine, random_tokens


def load(
    path: Path, position: RankPosition | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Decoder:
    return load_decoder(path, position or RankPosition(), SoloCollectives(), torch.float32, "cpu", on_progress)


@pytest.fixture
def copy(folder: Folder, tmp_path: Path) -> Path:
    return shutil.copytree(folder("llama"), tmp_path / "model")


def test_weights_over_several_files_are_those_of_one_file(folder: Folder) -> None:
    prompt = random_tokens(20)
    whole, spread = folder("qwen3"), folder("qwen3", shards=3)
    assert len(weight_files(spread)) == 3
    assert torch.equal(Engine(whole).logits(prompt), Engine(spread).logits(prompt))
    (spread / INDEX).rename(spread / "aside")
    assert len(weight_files(spread)) == 3
    (spread / "aside").rename(spread / INDEX)


def test_with_an_index_other_files_do_not_count(folder: Folder, tmp_path: Path) -> None:
    path = shutil.copytree(folder("qwen3", shards=3), tmp_path / "model")
    (path / "consolidated.safetensors").write_bytes(b"")
    assert "consolidated.safetensors" not in [file.name for file in weight_files(path)]


def test_progress_ends_at_the_total_and_a_rank_reads_its_part_only(folder: Folder) -> None:
    totals = {}
    for tp in (1, 2):
        seen: list[tuple[int, int]] = []

        def note(done: int, total: int, seen: list[tuple[int, int]] = seen) -> None:
            seen.append((done, total))

        load(folder("qwen3"), RankPosition(0, tp), note)
        done = [d for d, _ in seen]
        assert done == sorted(done)
        assert seen[-1][0] == seen[-1][1]
        totals[tp] = seen[-1][1]
    assert totals[2] < 0.6 * totals[1]


def test_ranks_read_together_every_element_once(folder: Folder) -> None:
    """Of the tensors that are split; over both tensor-parallel ranks and both stages."""
    read: dict[str, int] = {}
    path = folder("llama", heads=6, kv_heads=3, layers=3)
    for tp_rank in range(2):
        for pp_rank in range(2):
            for weight in weight_slices(path, RankPosition(tp_rank, 2, pp_rank, 2)):
                read[weight.name] = read.get(weight.name, 0) + weight.target.numel()
    tensors = load_file(path / "model.safetensors")
    assert set(read) == set(tensors)
    for name, tensor in tensors.items():
        assert read[name] == tensor.numel() * (2 if "norm" in name else 1), name


def weight_slices(path: Path, position: RankPosition) -> list[WeightSlice]:
    rank = RankSlice(load_config(path), position, SoloCollectives(), torch.float32, torch.device("cpu"))
    return list(Decoder(rank).weight_slices())


def test_a_missing_tensor_is_named(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copy)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(ModelError, match=r"lm_head\.weight .* \[100, 48\]; by config\.json it is \[101, 48\]"):
        load(copy)


def test_no_weights_broken_weights_and_lost_files_are_told_apart(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights"):
        load(copy)
    (copy / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    with pytest.raises(ModelError, match=r"names model-1\.safetensors, which is not in"):
        load(copy)
    for broken in ("{}", "[", '{"weight_map": {"a": "../x.safetensors"}}'):
        (copy / INDEX).write_text(broken)
        with pytest.raises(ModelError, match="not an index"):
            load(copy)
    with pytest.raises(ModelError, match="no model folder"):
        load(copy / "absent")


def test_a_model_with_too_little_to_share_is_refused_before_anything_is_read(folder: Folder) -> None:
    with pytest.raises(ModelError, match=r"4 attention heads.* tp 5"):
        load(folder("llama"), RankPosition(0, 5))
    with pytest.raises(ModelError, match=r"2 layers.* pp 3"):
        load(folder("llama"), RankPosition(0, 1, 0, 3))

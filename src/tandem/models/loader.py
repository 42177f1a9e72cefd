"""Loads weights from a folder of safetensors files; each rank reads only its own part of each tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tandem.errors import ModelError
from tandem.models.collectives import Collectives
from tandem.models.decoder import Decoder
from tandem.models.model_config import load_config
from tandem.models.rank_position import RankPosition
from tandem.models.rank_slice import RankSlice, WeightSlice

INDEX = "model.safetensors.index.json"


def load_decoder(
    path: str | Path,
    position: RankPosition,
    collectives: Collectives,
    dtype: torch.dtype,
    device: torch.device | str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Decoder:
    """Load the part of the model in the folder `path` that one rank computes, ready to run.

    Args:
        on_progress: called with the bytes read so far and in all, in the dtype of the computation.

    Raises:
        ModelError: the folder, a file or a tensor is missing, unreadable or of another shape than configured.
    """
    decoder = Decoder(RankSlice(load_config(path), position, collectives, dtype, torch.device(device)))
    weights = list(decoder.weight_slices())
    total = sum(weight.target.nbytes for weight in weights)
    done = 0
    with ExitStack() as stack:
        files = _open_tensors(path, stack)
        _check(path, files, weights)
        for weight in weights:
            weight.target.copy_(files[weight.name].get_slice(weight.name)[weight.part or (slice(None),)])
            done += weight.target.nbytes
            if on_progress is not None:
                on_progress(done, total)
    decoder.pack()
    return decoder


def weight_files(path: str | Path) -> list[Path]:
    """List the safetensors files of a model folder by name. Raises `ModelError`.

    Where there is an index it decides; other safetensors files that lie beside it do not count.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}")
    if (folder / INDEX).is_file():
        files = sorted(folder / name for name in set(_index(folder / INDEX).values()))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ModelError(f"{INDEX} names {missing[0]}, which is not in {folder}; was the download complete?")
        return files
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"no weights in {folder}: there are no *.safetensors files")
    return files


def _index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not all(isinstance(name, str) and Path(name).name == name for name in weight_map.values()):
            raise ValueError("a file outside the folder")
        return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not an index of safetensors files: {error}") from error


def _open_tensors(path: str | Path, stack: ExitStack) -> dict[str, Any]:
    """Open all files, through memory maps, until `stack` closes; return the file of each tensor by its name."""
    files: dict[str, Any] = {}
    for file in weight_files(path):
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is not a readable safetensors file: {error}") from error
        files.update(dict.fromkeys(opened.keys(), opened))
    return files


def _check(path: str | Path, files: dict[str, Any], weights: list[WeightSlice]) -> None:
    """Raise `ModelError` unless every tensor is there in the shape that the configuration asks for."""
    for weight in weights:
        if weight.name not in files:
            raise ModelError(f"the weights in {path} have no tensor {weight.name}")
        got = tuple(files[weight.name].get_slice(weight.name).get_shape())
        if got != weight.shape:
            raise ModelError(
                f"{weight.name} in {path} has shape {list(got)}; by config.json it is {list(weight.shape)}"
            )

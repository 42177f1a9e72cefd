"""Loads weights from a folder of safetensors files; each rank reads only its own part of each tensor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tandem.checkpoint.weight_files import weight_files
from tandem.errors import ModelError
from tandem.models.collectives import Collectives
from tandem.models.decoder import Decoder
from tandem.models.model_config import load_config
from tandem.models.rank_position import RankPosition
from tandem.models.rank_slice import RankSlice, WeightSlice


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

"""The safetensors files of a model folder, by its index where there is one. Knows no torch."""

from __future__ import annotations

import json
from pathlib import Path

from tandem.errors import ModelError

INDEX = "model.safetensors.index.json"


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

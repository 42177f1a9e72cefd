"""From what a person calls a model to its folder on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tandem.errors import ConfigError

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in Hugging Face format on this machine. `name`: what clients call it."""

    path: str
    name: str


def find_model(model: str, served_name: str | None = None) -> ModelFolder:
    """Return the folder of `model`, fetched from the hub if it is not a folder. Raises ConfigError.

    Args:
        served_name: what clients call the model, if not by its folder's or the hub's name.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{model} has no config.json; a folder in Hugging Face format was expected")
        return ModelFolder(str(path.resolve()), served_name or path.resolve().name)
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"{model} is neither a folder nor a name on the hub such as Qwen/Qwen3-0.6B")
    return ModelFolder(_fetch(model), served_name or model)


def _fetch(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name} is no folder here and could not be fetched from the hub: {first}") from None

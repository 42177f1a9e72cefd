"""From what a person calls a model to a local folder."""

from __future__ import annotations

from pathlib import Path

from tandem.errors import ConfigError

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


def local_model(model: str) -> tuple[Path, str]:
    """The folder of a model and its name; fetched from the hub if it is not a folder. Raises ConfigError."""
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{model} has no config.json; a folder in Hugging Face format was expected")
        return path.resolve(), path.resolve().name
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"{model} is neither a folder nor a name on the hub such as Qwen/Qwen3-0.6B")
    return Path(_fetch(model)), model


def _fetch(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name} is no folder here and could not be fetched from the hub: {first}") from None

"""From what a person calls a model to its folder on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.errors import ConfigError

WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model in Hugging Face format on this machine.

    Attributes:
        name: what it is called in answers.
        aliases: what else clients may call it.
    """

    path: str
    name: str
    aliases: tuple[str, ...] = ()


def find_model(model: str, served_names: Sequence[str] = ()) -> ModelFolder:
    """Return the folder of `model`, fetched from the hub if it is not a folder. Raises ConfigError.

    Clients may call it as `model` was typed, by its path, and by the last part of either.

    Args:
        served_names: what clients may call the model too, its name first, if not the folder's or the hub's name.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{model} has no config.json; a folder in Hugging Face format was expected")
        found = path.resolve()
        return _named(str(found), [*served_names, found.name, model, str(found)])
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"{model} is neither a folder nor a name on the hub such as Qwen/Qwen3-0.6B")
    return _named(_fetch(model), [*served_names, model, model.rpartition("/")[2]])


def _named(path: str, names: list[str]) -> ModelFolder:
    name, *aliases = dict.fromkeys(names)
    return ModelFolder(path, name, tuple(aliases))


def _fetch(name: str) -> str:
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(name, allow_patterns=WANTED))
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{name} is no folder here and could not be fetched from the hub: {first}") from None

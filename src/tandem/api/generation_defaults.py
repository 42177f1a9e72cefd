"""The sampling that a model's makers recommend: what generation_config.json says where a request says nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import msgspec

from tandem.api.tokenizer import read_json
from tandem.wire.sampling import SamplingParams

log = logging.getLogger(__name__)

FILE = "generation_config.json"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class GenerationDefaults(msgspec.Struct, frozen=True):
    """Defaults of requests.

    Attributes:
        sampling: fields of SamplingParams by name.
        max_tokens: of a chat.
    """

    sampling: dict[str, Any] = {}
    max_tokens: int | None = None


OPENAIS = GenerationDefaults()


def load_defaults(folder: Path) -> GenerationDefaults:
    """Read them. A value out of range is logged and left out. Raises ModelError for a file that is no JSON object."""
    content = read_json(folder / FILE)
    given = {name: value for name in SAMPLING if (value := content.get(name)) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    sampling = {name: value for name, value in given.items() if _is_good(folder, name, value)}
    longest = content.get("max_new_tokens")
    if longest is not None and not _is_good(folder, "max_tokens", longest):
        longest = None
    found = GenerationDefaults(sampling, longest)
    if found != OPENAIS:
        told = {**sampling, "max_new_tokens": longest}
        shown = ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
        log.info("requests that say nothing else get what %s says: %s", FILE, shown)
    return found


def _is_good(folder: Path, name: str, value: Any) -> bool:
    try:
        msgspec.convert({name: value}, SamplingParams)
    except msgspec.ValidationError as error:
        log.warning("%s: %s; this default is left out", folder / FILE, error)
        return False
    return True

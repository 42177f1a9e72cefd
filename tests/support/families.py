"""Small random models, one of each family that is served."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.make_random_model import RandomModel, write_random_model

import tandem

DEMO_MODEL = Path(tandem.__file__).parent / "demo_model"
VOCAB = 260
EOS = 258
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


@dataclass(frozen=True)
class ModelFamily:
    """A model's shape, and what its config.json has beyond that."""

    model: RandomModel
    config: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        write_random_model(folder, self.model, DEMO_MODEL)
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | self.config))
        return folder


def _small(family: str, **options: Any) -> RandomModel:
    shape: dict[str, Any] = {"hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 128}
    return RandomModel(
        **shape
        | {"family": family, "vocab": VOCAB, "max_positions": 1024, "eos_token_id": EOS, "tied": False}
        | options
    )


FAMILIES = {
    "qwen3": ModelFamily(_small("qwen3", head_dim=32)),
    "qwen3-tied": ModelFamily(_small("qwen3", tied=True, seed=1)),
    "qwen2": ModelFamily(_small("qwen2", shards=3)),
    "llama3": ModelFamily(_small("llama", tied=True), {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}),
    "llama2": ModelFamily(_small("llama", kv_heads=4, shards=2)),
    "mistral": ModelFamily(_small("mistral", kv_heads=1)),
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Token ids that are like those of no other length or seed."""
    return random.Random(f"{length}/{seed}").choices(range(256), k=length)

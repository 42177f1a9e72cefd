"""The model of the cluster: random, tiny, float32, with the tokenizer of the demo model."""

from __future__ import annotations

from pathlib import Path

from tandem.models.random_model import RandomModel, write_random_model
from tests.chaos.support import DEMO_MODEL, EOS, VOCAB


def write_model(folder: Path) -> Path:
    shape = RandomModel(
        hidden=64,
        layers=3,
        heads=4,
        kv_heads=2,
        head_dim=32,
        intermediate=128,
        vocab=VOCAB,
        max_positions=1024,
        tied=False,
        eos_token_id=EOS,
    )
    return write_random_model(folder, shape, DEMO_MODEL)

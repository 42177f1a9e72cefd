"""Small random models, one of each family that is served, and what transformers says that they say."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tandem
from tandem.models.random_model import RandomModel, write_random_model

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
class ChildProcesses:
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
    "qwen3": ChildProcesses(_small("qwen3", head_dim=32)),
    "qwen3-tied": ChildProcesses(_small("qwen3", tied=True, seed=1)),
    "qwen2": ChildProcesses(_small("qwen2", shards=3)),
    "llama3": ChildProcesses(_small("llama", tied=True), {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}),
    "llama2": ChildProcesses(_small("llama", kv_heads=4, shards=2)),
    "mistral": ChildProcesses(_small("mistral", kv_heads=1)),
}


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """Token ids that are like those of no other length or seed."""
    return random.Random(f"{length}/{seed}").choices(range(256), k=length)


class Reference:
    """Greedy tokens of a model folder in float32, one prompt at a time, as transformers computes them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model: Any = None
        self._known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The tokens that follow; end-of-sequence does not end them."""
        known = self._known.get(tuple(prompt), [])
        if len(known) < max_tokens:
            known = self._known[tuple(prompt)] = self._generate(list(prompt), max_tokens)
        return known[:max_tokens]

    def _generate(self, prompt: list[int], max_tokens: int) -> list[int]:
        import torch

        model = self._loaded()
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            # Without a mask, transformers takes every token that equals the padding for padding.
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return list(output[0, len(prompt) :].tolist())

    def _loaded(self) -> Any:
        if self._model is None:
            import torch
            from transformers import AutoModelForCausalLM

            torch.set_num_threads(1)
            self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()
            self._model.generation_config.eos_token_id = None
        return self._model


Write = Callable[[str], Path]

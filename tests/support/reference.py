"""The greedy tokens of a model as transformers computes them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any


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


@cache
def _reference(folder: Path) -> Reference:
    return Reference(folder)


def greedy(folder: Path, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Return the `max_tokens` most likely tokens, one after the other; end-of-sequence does not end them."""
    return _reference(folder)(prompt, max_tokens)

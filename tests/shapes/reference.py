"""What transformers answers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch


@cache
def _model(path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def greedy(path: Path, tokens: list[int], count: int) -> list[int]:
    """The most likely `count` tokens, one after the other, by running the whole sequence each time."""
    model = _model(path)
    sequence = list(tokens)
    with torch.inference_mode():
        for _ in range(count):
            logits = model(torch.tensor([sequence])).logits[0, -1]
            sequence.append(int(logits.argmax()))
    return sequence[len(tokens) :]

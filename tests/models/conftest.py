from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts.make_random_model import RandomModel, write_random_model

Folder = Callable[..., Path]
ReferenceLogits = Callable[[Path, list[int]], torch.Tensor]
ReferenceGreedy = Callable[[Path, list[int], int], list[int]]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Ranks are threads here, and the models are small: more threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Folders of tiny random models by family and what is special about them; each is made once."""
    made: dict[str, Path] = {}

    def get(family: str, **special: object) -> Path:
        key = f"{family} {sorted(special.items())}"
        if key not in made:
            shape: dict[str, Any] = dict(
                hidden=48, layers=2, heads=4, kv_heads=2, head_dim=16, intermediate=70, vocab=101, tied=False
            )
            model = RandomModel(family=family, **{**shape, **special})
            made[key] = write_random_model(tmp_path_factory.mktemp(family), model)
        return made[key]

    return get


@pytest.fixture(scope="session")
def reference() -> Callable[[Path], Any]:
    """transformers' model of a folder, in float32. Importing transformers takes seconds, so only here."""
    from transformers import AutoModelForCausalLM

    made: dict[Path, Any] = {}

    def get(path: Path) -> Any:
        if path not in made:
            made[path] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train(False)
        return made[path]

    return get


@pytest.fixture(scope="session")
def reference_logits(reference: Callable[[Path], Any]) -> ReferenceLogits:
    def get(path: Path, tokens: list[int]) -> torch.Tensor:
        with torch.inference_mode():
            logits: torch.Tensor = reference(path)(torch.tensor([tokens])).logits[0].float()
        return logits

    return get


@pytest.fixture(scope="session")
def reference_greedy(reference: Callable[[Path], Any]) -> ReferenceGreedy:
    def get(path: Path, prompt: list[int], count: int) -> list[int]:
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(count):
                tokens.append(int(reference(path)(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    return get

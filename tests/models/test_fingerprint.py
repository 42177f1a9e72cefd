from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tandem.errors import ModelError
from tandem.models import fingerprint as module
from tandem.models.fingerprint import fingerprint
from tests.models.conftest import Folder


@pytest.fixture
def copy(folder: Folder, tmp_path: Path) -> Path:
    return shutil.copytree(folder("llama"), tmp_path / "model")


def change(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_copy_of_a_model_has_its_fingerprint(folder: Folder, copy: Path) -> None:
    assert fingerprint(copy) == fingerprint(folder("llama"))


def test_what_leaves_keys_and_values_alone_leaves_the_fingerprint(copy: Path) -> None:
    before = fingerprint(copy)
    change(copy, torch_dtype="bfloat16", eos_token_id=5, max_position_embeddings=99)
    (copy / "tokenizer.json").write_text("{}")
    assert fingerprint(copy) == before


@pytest.mark.parametrize("changes", [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-5}, {"num_key_value_heads": 1}])
def test_another_architecture_has_another_fingerprint(copy: Path, changes: dict[str, object]) -> None:
    before = fingerprint(copy)
    change(copy, **changes)
    assert fingerprint(copy) != before


@pytest.mark.parametrize("whole_up_to", [module.WHOLE_UP_TO, 0])
def test_other_weights_have_another_fingerprint(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, whole_up_to: int
) -> None:
    monkeypatch.setattr(module, "WHOLE_UP_TO", whole_up_to)
    prints = {fingerprint(folder("llama", seed=seed)) for seed in (0, 1)}
    prints.add(fingerprint(folder("llama", shards=2)))
    assert len(prints) == 3


def test_any_byte_counts_in_small_weights(copy: Path) -> None:
    before = fingerprint(copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert fingerprint(copy) != before


def test_a_file_that_is_no_safetensors_is_refused(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_UP_TO", 0)
    (copy / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match="not a safetensors file"):
        fingerprint(copy)

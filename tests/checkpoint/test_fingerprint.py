"""Every byte of the weights counts, whoever computes the fingerprint and wherever the folder lies."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from scripts.make_random_model import RandomModel, write_random_model

from tandem.checkpoint import fingerprint as module
from tandem.checkpoint.digest_cache import DigestCache
from tandem.checkpoint.fingerprint import fingerprint, fingerprint_in_background, sketch
from tandem.errors import ModelError

Make = Callable[..., Path]
NO_CACHE = DigestCache(None)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def write(name: str, seed: int = 0, shards: int = 1) -> Path:
        model = RandomModel("llama", 48, layers=2, vocab=101, seed=seed, shards=shards)
        return write_random_model(tmp_path / name, model)

    return write


@pytest.fixture
def model(make: Make) -> Path:
    return make("model")


def of(path: Path) -> str:
    return fingerprint(path, NO_CACHE)


def change(path: Path, **changes: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))


def flip(file: Path, offset: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 1]))


def test_a_copy_has_the_fingerprint_of_the_original_whatever_its_files_are_called(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    assert of(copy) == of(model)
    assert sketch(copy) == sketch(model)


def test_what_leaves_keys_and_values_alone_leaves_the_fingerprint(model: Path) -> None:
    before = of(model)
    change(model, torch_dtype="bfloat16", eos_token_id=5, max_position_embeddings=99)
    (model / "tokenizer.json").write_text("{}")
    assert of(model) == before


@pytest.mark.parametrize(
    "changes", [{"rope_theta": 5e5}, {"rms_norm_eps": 1e-5}, {"num_key_value_heads": 1}, {"never_heard_of": 1}]
)
def test_another_architecture_has_another_fingerprint(model: Path, changes: dict[str, object]) -> None:
    before = of(model), sketch(model)
    change(model, **changes)
    assert of(model) != before[0]
    assert sketch(model) != before[1]


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_the_longest_context_counts_where_it_may_stretch_the_rotary_embedding(model: Path, key: str) -> None:
    change(model, **{key: {"rope_type": "yarn", "factor": 2.0}})
    before = of(model)
    change(model, max_position_embeddings=99)
    assert of(model) != before


def test_every_byte_of_the_weights_counts(model: Path) -> None:
    """A file of any size is read whole: of this one each byte is tried that begins a page, and the last."""
    weights = model / "model.safetensors"
    before, size = of(model), weights.stat().st_size
    for offset in [*range(0, size, 4096), size - 1]:
        flip(weights, offset)
        assert of(model) != before, offset
        flip(weights, offset)
    assert of(model) == before


def test_large_files_count_whole_too(model: Path) -> None:
    """64 MiB and 1 byte more, sparse: the sampled digest of old saw 64 pieces of it."""
    weights = model / "model.safetensors"
    with weights.open("r+b") as stream:
        stream.truncate((64 << 20) + 4096)
    before = of(model)
    flip(weights, (32 << 20) + 512 * 1024 + 77)
    assert of(model) != before


def test_other_weights_have_another_fingerprint_and_so_have_others_files_of_them(make: Make) -> None:
    assert len({of(make("a")), of(make("b", seed=1)), of(make("c", shards=2))}) == 3


def test_the_name_of_a_hubs_blob_is_its_digest(model: Path, tmp_path: Path) -> None:
    """As huggingface_hub lays its cache out; and it is not read again."""
    weights = model / "model.safetensors"
    name = hashlib.sha256(weights.read_bytes()).hexdigest()
    hub = tmp_path / "models--o--m"
    snapshot = hub / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    shutil.copy(model / "config.json", snapshot)
    shutil.copy(weights, hub / "blobs" / name)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{name}")
    assert of(snapshot) == of(model)
    flip(hub / "blobs" / name, 200)
    assert of(snapshot) == of(model)


def test_a_file_that_goes_on_changing_is_an_error(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = module._read

    def read_while_it_is_written(file: Path) -> str:
        with file.open("ab") as stream:
            stream.write(b"more")
        return read(file)

    monkeypatch.setattr(module, "_read", read_while_it_is_written)
    with pytest.raises(ModelError, match="is being written to"):
        of(model)


def test_a_file_that_changed_once_while_it_was_read_is_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, changes = module._read, [b"more"]

    def read_after_a_change(file: Path) -> str:
        digest = read(file)
        if changes:
            with file.open("ab") as stream:
                stream.write(changes.pop())
        return digest

    monkeypatch.setattr(module, "_read", read_after_a_change)
    found = of(model)
    monkeypatch.undo()
    assert found == of(model)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000])
def test_a_configuration_that_cannot_be_read_is_an_error(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json"):
        of(model)


def test_an_error_in_the_background_comes_with_the_result(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no model folder"):
        fingerprint_in_background(tmp_path / "none").result(10)


def test_the_background_does_not_keep_the_process_alive(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    monkeypatch.setattr(module, "_read", lambda file: let_go.wait(10) and "digest")
    monkeypatch.setenv("XDG_CACHE_HOME", str(model / "cache"))
    future = fingerprint_in_background(model)
    threads = [thread for thread in threading.enumerate() if thread.name == "fingerprint"]
    assert [thread.daemon for thread in threads] == [True]
    let_go.set()
    assert future.result(10)


def test_it_needs_no_torch(model: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from tandem.checkpoint.fingerprint import fingerprint;"
        f"from tandem.checkpoint.digest_cache import DigestCache; print(fingerprint({str(model)!r}, DigestCache(None)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == of(model)
